"""Personal data in a text, of the kinds that have a form: addresses, numbers of phones, cards and accounts.

Belongs here: what is taken for personal data, and where in a text it is. Does not belong here: what happens to such a
row (`screen`). The data itself never leaves this module: it returns kinds and places.

Numbers with a check digit must pass it. What documents reserve for examples is none: addresses of RFC 2606, 5737 and
6761, the cards and accounts that payment services print, and names that stand for anybody. A made-up address in
ordinary form cannot be told from a real one. Names of people and postal addresses have no form and are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence

import polars as pl

from qaq_pipeline.config.settings import PersonalData
from qaq_pipeline.screening.finding import Finding

_ANYBODY = frozenset(
    (
        *("user", "username", "name", "your", "you", "me", "someone", "somebody", "test", "foo", "bar", "abc", "xyz"),
        *("email", "mail", "admin", "info", "support", "contact", "hello", "noreply", "no-reply", "git", "root"),
        *("john", "jane", "john.doe", "jane.doe", "johndoe", "janedoe", "john_doe", "jane_doe", "alice", "bob"),
    )
)
"""Names before the @ that are nobody's."""
_RESERVED = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|local|internal)$|(?:^|[.-])(?:example|domain|company|yourdomain|mydomain"
    r"|website|email|test|acme|foo|bar)\.[a-z]+$|(?:^|\.)users\.noreply\.github\.com$"
)
_FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "py", "json", "html", "xml", "so", "dll")
"""Endings of names such as `icon@2x.png`."""
_PRINTED = frozenset(
    (
        *("4111111111111111", "4242424242424242", "4000000000000002", "4012888888881881", "4222222222222"),
        *("5555555555554444", "5105105105105100", "2223003122003222", "378282246310005", "371449635398431"),
        *("6011111111111117", "6011000990139424", "30569309025904", "38520000023237", "3530111333300000"),
        *("4532015112830366", "4539578763621486", "4916338506082832", "5425233430109903", "4000056655665556"),
        *("GB82WEST12345698765432", "GB29NWBK60161331926819", "GB33BUKB20201555555555", "DE89370400440532013000"),
        *("FR1420041010050500013M02606", "NL91ABNA0417164300", "ES9121000418450200051332", "CH9300762011623852957"),
    )
)
"""Numbers of cards and accounts that documents show as examples."""
_PUBLIC_RESOLVERS = frozenset(("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "1.2.3.4", "4.3.2.1"))


def find(text: str, kinds: Sequence[PersonalData]) -> Iterator[Finding]:
    """The personal data of these kinds in a text, kind by kind."""
    for kind in kinds:
        pattern, is_some = _KINDS[kind]
        yield from (
            Finding(kind.replace("_", " "), one.start() + 1) for one in pattern.finditer(text) if is_some(one[0])
        )


def may_have(text: pl.Expr, kinds: Sequence[PersonalData]) -> pl.Expr:
    """Whether a text may have personal data of these kinds: true wherever `find` finds some, and quick."""
    return text.str.contains("|".join(_HINTS[kind] for kind in kinds))


def _is_email(address: str) -> bool:
    name, _, domain = address.lower().rpartition("@")
    is_anybody = name in _ANYBODY or re.fullmatch(r"(?:your|my|user|test|name|first|last)[._\w-]*", name) is not None
    return not (is_anybody or _RESERVED.search(domain) or domain.rpartition(".")[2] in _FILES)


def _is_address(text: str) -> bool:
    """Whether an IP address is one of the internet, and none that everybody knows."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    is_time = ":" in text and all(len(part) < 3 for part in text.split(":"))
    return address.is_global and not (address.is_multicast or is_time or text in _PUBLIC_RESOLVERS)


def _is_card(text: str) -> bool:
    """Whether the number passes Luhn's check (ISO/IEC 7812) and begins as those of the large networks do."""
    digits = re.sub(r"\D", "", text)
    doubled = [sum(divmod(2 * int(digit), 10)) if place % 2 else int(digit) for place, digit in enumerate(digits[::-1])]
    return digits not in _PRINTED and len(set(digits)) > 3 and sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether the number passes the check of ISO 13616 (modulo 97)."""
    number = text.replace(" ", "")
    moved = number[4:] + number[:4]
    return number not in _PRINTED and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _is_phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    is_made_up = "12345" in digits or "555" in digits or "98765" in digits or len(set(digits)) < 5
    return 9 <= len(digits) <= 15 and not is_made_up


def _is_ssn(text: str) -> bool:
    """Whether it can be a number of the United States' social security."""
    return text not in ("123-45-6789", "078-05-1120", "219-09-9999", "987-65-4321") and len(set(text)) > 4


_KINDS: dict[PersonalData, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (
        re.compile(r"(?<![\w.%+/:-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w@-])"),
        _is_email,
    ),
    "ip_address": (
        re.compile(r"(?<![\w.:/-])(?:(?:\d{1,3}\.){3}\d{1,3}|(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4})(?![\w.:-])"),
        _is_address,
    ),
    "payment_card": (
        re.compile(r"(?<![\w.-])(?:4|5[1-5]|2[2-7]|3[47]|6(?:011|5))\d{0,3}(?:[ -]?\d{2,6}){2,4}(?![\w-]|\.\d)"),
        lambda text: 13 <= sum(map(str.isdigit, text)) <= 19 and _is_card(text),
    ),
    "bank_account": (
        re.compile(r"(?<!\w)[A-Z]{2}\d{2} ?(?:[A-Z0-9]{4} ?){2,7}[A-Z0-9]{1,4}(?!\w)"),
        _is_iban,
    ),
    "phone_number": (re.compile(r"(?<![\w+])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![\w-])"), _is_phone),
    "us_social_security": (
        re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        _is_ssn,
    ),
}

_HINTS: dict[PersonalData, str] = {
    "email": r"[A-Za-z0-9]@[A-Za-z0-9-]+\.",
    "ip_address": r"(?:\d{1,3}\.){3}\d|(?:[0-9a-fA-F]{1,4}:){7}",
    "payment_card": r"\d{2}(?:[ -]?\d){10}",
    "bank_account": r"[A-Z]{2}\d{2} ?[A-Z0-9]{4}",
    "phone_number": r"\+[1-9]",
    "us_social_security": r"\d{3}-\d{2}-\d{4}",
}
"""A part of every pattern."""
