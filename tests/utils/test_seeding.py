"""Streams derived from the seed: known values, independence, and global generators given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.utils.seeding import derive, generator, normal_like, preserved, seed_global, uniform_like


def test_derive_returns_the_documented_seeds() -> None:
    # printf '0\x1forder\x1f1' | sha256sum begins 62d4548c3ae17639: read as a little-endian number and halved.
    assert derive(0, "order", 1) == 0x3976E13A8C54D462 >> 1
    # printf '7' | sha256sum begins 7902699be42c8a8e.
    assert derive(7) == 0x8E8A2CE49B690279 >> 1


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_derive_returns_seeds_that_torch_accepts(seed: int, epoch: int) -> None:
    derived = derive(seed, "augment", epoch)
    assert 0 <= derived < 2**63
    torch.Generator().manual_seed(derived)


def test_derive_separates_the_parts_of_a_key() -> None:
    keys: list[tuple[str | int, ...]] = [(), ("a",), ("a", 1), ("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), (1, 2)]
    assert len({derive(0, *key) for key in keys} | {derive(1, *key) for key in keys}) == 2 * len(keys)


def test_generator_streams_are_independent() -> None:
    before = torch.get_rng_state()
    one, other = generator(0, "one"), generator(0, "other")
    torch.rand(1000, generator=one)
    assert torch.equal(torch.rand(5, generator=other), torch.rand(5, generator=generator(0, "other")))
    assert torch.equal(torch.get_rng_state(), before)


def test_preserved_restores_the_global_generator_after_an_error() -> None:
    before = torch.get_rng_state()
    with preserved():
        seed_global(5, "craft")
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="must match"), preserved():
        torch.rand(10) + torch.rand(9)
    assert torch.equal(torch.get_rng_state(), before)
    with preserved():
        seed_global(5, "craft")
        assert torch.equal(torch.rand(4), first)
        seed_global(5, "other")
        assert not torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1, 8, 8), (5, 7)])
def test_uniform_like_and_normal_like_equal_torch(shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape)
    with preserved():
        torch.manual_seed(1)
        uniform, normal = uniform_like(images, 0.25), normal_like(images, 0.001)
        torch.manual_seed(1)
        assert torch.equal(uniform, torch.empty(shape).uniform_(-0.25, 0.25))
        assert torch.equal(normal, 0.001 * torch.randn(shape))


def test_noise_is_the_same_in_channels_last() -> None:
    plain = torch.zeros(4, 3, 8, 8)
    last = plain.contiguous(memory_format=torch.channels_last)
    for draw in (uniform_like, normal_like):
        with preserved():
            torch.manual_seed(2)
            expected = draw(plain, 0.1)
            torch.manual_seed(2)
            noise = draw(last, 0.1)
        assert torch.equal(noise, expected)
        assert noise.is_contiguous(memory_format=torch.channels_last)
        assert expected.is_contiguous()


def test_noise_has_the_dtype_of_the_images() -> None:
    half = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    assert uniform_like(half, 0.1).dtype == normal_like(half, 0.1).dtype == torch.float64
