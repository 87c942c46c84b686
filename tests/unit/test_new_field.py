"""The example of how a field is added stays true; tests/e2e runs it."""

import shutil

from tests.new_field import ROOT, apply, changes


def test_the_example_fits_the_code_and_four_files_know_it(tmp_path):
    assert len(changes()) == 4
    for file in changes():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    apply(tmp_path)
    for file in changes():
        assert "noise_scale" in (tmp_path / file).read_text()
