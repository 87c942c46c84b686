"""Whatever a URL is made of, only one of ours leads to a file."""

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from krea2_server.storage.local import ExpiredFileError, LocalStore, UnknownFileError
from krea2_server.storage.signatures import new_name, sign, verify
from tests.unit.server.storage.stores import BASE_URL, KEY, PATH, Clock, local_store, parts

NAME, EXPIRES = "0123456789abcdef" * 2 + ".png", 1_700_000_100
SIGNATURE = sign(KEY, NAME, EXPIRES)

TRAVERSALS = [
    "../secret.png",
    "..",
    ".",
    "",
    "/etc/passwd",
    "..\\secret.png",
    "C:\\secret.png",
    "%2e%2e%2fsecret.png",
    "%2e%2e/secret.png",
    "..%00.png",
    f"../{NAME}",
    f"./{NAME}",
    f"/{NAME}",
    f"{NAME}/",
    f"{NAME}/../{NAME}",
    f"images/{NAME}",
    f"{NAME}\0",
    f"{NAME}\0.png",
    f"{NAME}\n",
    f" {NAME}",
    f"{NAME}.partial",
    f"{EXPIRES}-{NAME}",
    NAME.upper(),
    NAME.replace("0", "٠"),
    NAME.replace("a", "а"),  # Cyrillic
    NAME[1:],
    f"0{NAME}",
    NAME.replace(".png", ".svg"),
    NAME * 100_000,
    "\ud800",
]


def unknown(name, expires, signature, folder):
    store = LocalStore(
        folder, signing_key=KEY, expiry_s=100, max_bytes=100, path=PATH, clock=Clock()
    )
    with pytest.raises(UnknownFileError) as raised:
        asyncio.run(store.get(name, expires, signature))
    assert str(raised.value) == ""
    assert raised.value.__context__ is None


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: ascii(name)[:60])
def test_a_name_that_is_not_ours_is_unknown_even_if_signed(name, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / NAME).write_bytes(b"secret")
    (tmp_path / f"{EXPIRES}-{NAME}").write_bytes(b"secret")
    (folder / NAME).write_bytes(b"secret")
    unknown(name, str(EXPIRES), SIGNATURE, folder)
    if name.isascii():
        unknown(name, str(EXPIRES), sign(KEY, name, EXPIRES), folder)


@pytest.mark.parametrize(
    "expires",
    [
        "",
        "0",
        f"0{EXPIRES}",
        f"+{EXPIRES}",
        f" {EXPIRES}",
        f"{EXPIRES}\n",
        f"{EXPIRES}.0",
        "17_0000_0100",
        "-1",
        "1e9",
        "nan",
        "٣",
        "9" * 13,
        "9" * 10_000,
        pytest.param(10**5000, id="more digits than Python prints"),
        -EXPIRES,
        0,
        True,
        None,
        float(EXPIRES),
        [str(EXPIRES), str(EXPIRES)],
    ],
    ids=lambda expires: ascii(expires)[:30],
)
def test_an_expiry_that_is_not_the_signed_one_is_unknown(expires, tmp_path):
    unknown(NAME, expires, SIGNATURE, tmp_path)


@pytest.mark.parametrize(
    "signature",
    [
        "",
        SIGNATURE[:-1],
        SIGNATURE + "0",
        SIGNATURE * 10_000,
        SIGNATURE.upper(),
        f"{SIGNATURE}\n",
        SIGNATURE[:-1] + "é",
        "٠" * 64,
        "0" * 64,
        sign(KEY, NAME, EXPIRES + 1),
        sign(KEY[::-1], NAME, EXPIRES),
        sign(b"", NAME, EXPIRES),
        None,
        SIGNATURE.encode(),
        [SIGNATURE, SIGNATURE],
    ],
    ids=lambda signature: ascii(signature)[:30],
)
def test_another_signature_is_unknown(signature, tmp_path):
    unknown(NAME, str(EXPIRES), signature, tmp_path)


def test_the_signed_url_itself_is_known():
    # Else all of the above would pass whatever was refused.
    assert verify(KEY, NAME, str(EXPIRES), SIGNATURE) == EXPIRES
    assert verify(KEY, NAME, EXPIRES, SIGNATURE) == EXPIRES


ANYTHING = st.one_of(
    st.text(),
    st.binary(),
    st.integers(),
    st.none(),
    st.lists(st.text()),
    st.from_regex(r"[0-9a-f]{32}\.(png|jpeg|webp)", fullmatch=True),
    st.from_regex(r"[0-9]{1,12}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    st.sampled_from([NAME, str(EXPIRES), EXPIRES, SIGNATURE, *TRAVERSALS]),
)


@given(name=ANYTHING, expires=ANYTHING, signature=ANYTHING)
@example(name=NAME, expires=EXPIRES, signature=SIGNATURE)
def test_nothing_but_what_was_signed_is_known(name, expires, signature):
    ours = name == NAME and str(expires) == str(EXPIRES) and signature == SIGNATURE
    assert verify(KEY, name, expires, signature) == (EXPIRES if ours else None)


@given(data=st.data(), part=st.integers(0, 2), extension=st.sampled_from(["png", "jpeg", "webp"]))
def test_a_url_with_one_character_changed_is_unknown(data, part, extension):
    name = new_name(extension)
    url = [name, str(EXPIRES), sign(KEY, name, EXPIRES)]
    assert verify(KEY, *url) == EXPIRES
    at = data.draw(st.integers(0, len(url[part]) - 1))
    other = data.draw(st.characters().filter(lambda character: character != url[part][at]))
    url[part] = url[part][:at] + other + url[part][at + 1 :]
    assert verify(KEY, *url) is None


def test_parts_of_two_urls_do_not_make_a_third(tmp_path):
    async def check():
        clock = Clock()
        async with local_store(tmp_path, clock=clock) as store:
            first = parts(await store.put(b"x", "png", BASE_URL))
            clock.now += 10
            second = parts(await store.put(b"y", "png", BASE_URL))
            for part in range(3):
                mixed = [*first]
                mixed[part] = second[part]
                with pytest.raises(UnknownFileError):
                    await store.get(*mixed)
            # Nor does a forged one tell that a file has expired.
            clock.now += 1000
            with pytest.raises(UnknownFileError):
                await store.get(first[0], first[1], second[2])
            with pytest.raises(ExpiredFileError):
                await store.get(*first)

    asyncio.run(check())


def test_names_do_not_repeat():
    assert len({new_name("png") for _ in range(1000)}) == 1000
