"""Random numbers that are the same on every machine: a keyed hash of a name, such as a pair_id.

Belongs here: the draw of a name. Does not belong here: what is drawn, and in which order.
"""

from __future__ import annotations

import hashlib

import polars as pl


def draws(names: pl.Series, seed: int) -> pl.Series:
    """floor(h / 2**11) / 2**53, in [0, 1), of h = the 64-bit big-endian blake2b of a name under the key of `seed`.

    hashlib, since Series.hash is not stable across versions of Polars.
    """
    key = hashlib.blake2b(str(seed).encode()).digest()
    digests = [hashlib.blake2b(name.encode(), key=key, digest_size=8).digest() for name in names]
    hashed = pl.Series(digests, dtype=pl.Binary).bin.reinterpret(dtype=pl.UInt64, endianness="big")
    return (hashed // 2**11).cast(pl.Float64) / 2**53
