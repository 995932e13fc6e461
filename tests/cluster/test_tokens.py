"""The right to pieces: what is accepted, and precisely why anything else is not."""

from __future__ import annotations

import base64
import hashlib
import hmac

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.tokens import (
    Claims,
    Revocations,
    SessionClaims,
    TokenError,
    TokenFault,
    VerifyingKey,
    sign_session,
    sign_token,
    verify_session,
    verify_token,
)

KEY = Ed25519PrivateKey.generate()
NOW_MS = 1_800_000_000_000
CLAIMS = Claims(
    user="anna",
    peer_id="p" * 52,
    group="boats",
    epoch=17,
    issued_at_ms=NOW_MS,
    expires_at_ms=NOW_MS + 1_800_000,
    key_id="n1-a",
)
KEYS = {"n1-a": VerifyingKey("n1-a", KEY.public_key())}
TOKEN = sign_token(CLAIMS, KEY, "n1-a")


def fault(token: str, now_ms: int = NOW_MS, keys: dict[str, VerifyingKey] = KEYS, **more: str) -> TokenFault:
    with pytest.raises(TokenError) as caught:
        verify_token(token, keys, now_ms, **more)  # type: ignore[arg-type]
    assert token[:20] not in str(caught.value), "a refusal tells nothing of the token"
    return caught.value.fault


def part(value: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(value)).rstrip(b"=").decode()


def test_a_good_token_says_what_was_signed() -> None:
    assert verify_token(TOKEN, KEYS, NOW_MS, peer_id=CLAIMS.peer_id, group="boats") == CLAIMS


def test_it_is_for_one_peer_and_one_group() -> None:
    assert fault(TOKEN, peer_id="q" * 52) is TokenFault.OTHER_PEER
    assert fault(TOKEN, group="ships") is TokenFault.OTHER_GROUP


def test_its_time() -> None:
    last_ms = CLAIMS.expires_at_ms - 1
    assert verify_token(TOKEN, KEYS, last_ms) == CLAIMS
    assert fault(TOKEN, last_ms + 1) is TokenFault.EXPIRED
    assert verify_token(TOKEN, KEYS, NOW_MS - 60_000) == CLAIMS
    assert fault(TOKEN, NOW_MS - 60_001) is TokenFault.NOT_YET


def test_another_key_and_an_old_key() -> None:
    assert fault(sign_token(CLAIMS, Ed25519PrivateKey.generate(), "n1-a")) is TokenFault.SIGNATURE
    assert fault(sign_token(CLAIMS, KEY, "n9-z")) is TokenFault.KEY_UNKNOWN
    retired = {"n1-a": VerifyingKey("n1-a", KEY.public_key(), NOW_MS)}
    assert fault(TOKEN, NOW_MS, retired) is TokenFault.KEY_RETIRED
    assert verify_token(TOKEN, retired, NOW_MS - 1) == CLAIMS, "what it signed counts until it is retired"


def test_the_algorithm_is_ours_whatever_the_header_says() -> None:
    _, payload, signature = TOKEN.split(".")
    public = KEY.public_key().public_bytes_raw()
    for algorithm in ("none", "None", "HS256", "ES256", "RS256", "", None, 7, ["EdDSA"]):
        forged = f"{part({'alg': algorithm, 'typ': 'JWT', 'kid': 'n1-a'})}.{payload}"
        mac = base64.urlsafe_b64encode(hmac.new(public, forged.encode(), hashlib.sha256).digest())
        for end in ("", signature, mac.rstrip(b"=").decode()):
            assert fault(f"{forged}.{end}") in (TokenFault.ALGORITHM, TokenFault.MALFORMED)
    confused = jwt.encode({"aud": "pieces"}, public, algorithm="HS256", headers={"kid": "n1-a"})
    assert fault(confused) is TokenFault.ALGORITHM
    assert fault(f"{part({'alg': 'EdDSA'})}.{payload}.{signature}") is TokenFault.KEY_UNKNOWN
    assert fault(f"{part({'alg': 'EdDSA', 'kid': ['n1-a']})}.{payload}.{signature}") in (
        TokenFault.KEY_UNKNOWN,
        TokenFault.MALFORMED,
    )


def test_a_session_is_no_token_and_a_token_no_session() -> None:
    session = SessionClaims(
        user="anna",
        session_id="s",
        epoch=1,
        issued_at_ms=NOW_MS,
        expires_at_ms=NOW_MS + 1_000,
        key_id="n1-a",
    )
    signed = sign_session(session, KEY, "n1-a")
    assert verify_session(signed, KEYS, NOW_MS) == session
    assert fault(signed) is TokenFault.PURPOSE
    with pytest.raises(TokenError) as caught:
        verify_session(TOKEN, KEYS, NOW_MS)
    assert caught.value.fault is TokenFault.PURPOSE


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "17"},
        {"epoch": 17.5},
        {"exp": "x"},
        {"exp": 1e300},
        {"sub": None},
        {"peer": 1},
        {"iat": True},
    ],
)
def test_claims_of_wrong_types_are_malformed_even_when_signed(change: dict[str, object]) -> None:
    good = jwt.decode(TOKEN, options={"verify_signature": False})
    signed = jwt.encode(good | change, KEY, algorithm="EdDSA", headers={"kid": "n1-a"})
    assert fault(signed) is TokenFault.MALFORMED


def test_garbage_is_malformed() -> None:
    for garbage in ("", ".", "..", "a.b.c", "é" * 10, TOKEN + "x" * 3_000, TOKEN.replace(".", ""), "\0"):
        with pytest.raises(TokenError) as caught:
            verify_token(garbage, KEYS, NOW_MS)
        assert caught.value.fault is TokenFault.MALFORMED


@given(position=st.integers(0, len(TOKEN) - 1), letter=st.sampled_from("AbZz09-_.=\0é"))
def test_one_changed_letter_is_refused(position: int, letter: str) -> None:
    changed = TOKEN[:position] + letter + TOKEN[position + 1 :]
    try:
        claims = verify_token(changed, KEYS, NOW_MS)
    except TokenError:
        return
    # The last letter of base64 carries bits that decode to nothing: the same bytes were signed.
    assert claims == CLAIMS
    assert changed == TOKEN or position in (len(TOKEN) - 1, TOKEN.index(".") - 1)


@given(text=st.text(max_size=200))
def test_no_text_raises_anything_else(text: str) -> None:
    with pytest.raises(TokenError):
        verify_token(text, KEYS, NOW_MS)


def test_revocations_cover_what_is_older_and_what_they_name() -> None:
    known = Revocations()
    assert not known.covers(CLAIMS, "m")
    known.add("ships", 99)
    known.add("boats", 99, user="ben")
    known.add("boats", 99, manifest_id="other")
    known.add("boats", 17, user="anna")
    assert not known.covers(CLAIMS, "m"), "a membership that began at the removal is not older"
    known.add("boats", 18, manifest_id="m")
    assert known.covers(CLAIMS, "m")
    assert not known.covers(CLAIMS, "n")
    known.lift("boats", manifest_id="m")
    assert not known.covers(CLAIMS, "m")
    known.add("boats", 20, user="anna")
    known.add("boats", 19, user="anna")
    assert known.covers(CLAIMS)
    known.replace("boats", [("", "", 16)])
    assert not known.covers(CLAIMS)
    known.add("boats", 18)
    assert known.covers(CLAIMS)


_NAMES = st.sampled_from(["", "a", "b"])
_ROWS = st.lists(st.tuples(st.sampled_from("gh"), _NAMES, _NAMES, st.integers(0, 9)), max_size=12)


@given(
    rows=_ROWS,
    group=st.sampled_from("gh"),
    user=st.sampled_from("ab"),
    manifest=_NAMES,
    epoch=st.integers(0, 9),
)
def test_revocations_against_a_naive_reading(
    rows: list[tuple[str, str, str, int]], group: str, user: str, manifest: str, epoch: int
) -> None:
    known = Revocations()
    rows = [row for row in rows if not (row[1] and row[2])]
    for g, u, m, e in rows:
        known.add(g, e, user=u, manifest_id=m)
    claims = Claims(user=user, peer_id="p", group=group, epoch=epoch, issued_at_ms=0, expires_at_ms=1)
    expected = any(
        g == group and epoch < e and ((u == "" and m == "") or u == user or (m and m == manifest))
        for g, u, m, e in rows
    )
    assert known.covers(claims, manifest) == expected
