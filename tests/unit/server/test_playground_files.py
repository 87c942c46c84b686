"""The files as they are served."""

import re

from krea2_server.playground import playground_files


def test_the_page_and_all_it_names_are_there():
    files = playground_files()
    assert set(files) >= {"/", "/playground/playground.js", "/playground/playground.css"}
    page = files["/"][0].decode()
    for name in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert f"/{name}" in files
    for path, (content, _) in files.items():
        for name in re.findall(r'from "\./([^"]+)"', content.decode()):
            assert f"/playground/{name}" in files, path


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    for path, (content, media_type) in playground_files().items():
        text = content.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|@import|\burl\(", text), path
        if media_type.startswith("text/html"):
            assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", text)


def test_media_types_are_what_browsers_insist_on():
    types = {path: media_type for path, (_, media_type) in playground_files().items()}
    assert types["/"] == "text/html; charset=utf-8"
    assert types["/playground/playground.js"] == "text/javascript; charset=utf-8"
    assert types["/playground/playground.css"] == "text/css; charset=utf-8"
    assert types["/playground/icon.svg"] == "image/svg+xml"
