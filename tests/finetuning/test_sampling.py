"""The contents of batches: shares, order, captions, duplicates."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from finetuning_samples import NoisePictures
from sparsight.errors import UserError
from sparsight.finetuning import captioned
from sparsight.finetuning.sampling import PairSampler


def sampler(n=40, n_attack=9, captions=None, **options):
    texts = captions or [(f"caption {i}", f"other {i}") for i in range(n)]
    data = captioned(NoisePictures(n, texts))
    attack = captioned(NoisePictures(n_attack, [("an attack",)])) if n_attack else None
    return PairSampler(data, attack, **{"batch_size": 8, "attack_share": 0.25, **options})


def batches(*args, n=50, **options):
    return list(islice(sampler(*args, **options).batches(), n))


def test_equal_seeds_give_equal_batches_and_other_seeds_others():
    assert batches(seed=1) == batches(seed=1)
    assert batches(seed=1) != batches(seed=2)
    assert batches(n=50)[:7] == batches(n=7)


def test_every_batch_has_its_share_of_attacks_and_no_attack_is_seen_twice_as_often():
    """Attacks that were also in the data, or in batches of their own, would be seen twice."""
    drawn = batches()
    assert all(sum(pair.attack for pair in batch) == 2 for batch in drawn)
    seen = Counter(pair.place for batch in drawn for pair in batch if pair.attack)
    assert set(seen) == set(range(9))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_each_pass_has_every_image_once_in_a_new_order():
    places = [pair.place for batch in batches(n_attack=0) for pair in batch]
    passes = [places[i : i + 40] for i in range(0, 400, 40)]
    assert all(sorted(each) == list(range(40)) for each in passes)
    assert passes[0] != passes[1]


def test_the_caption_of_an_image_varies():
    drawn = Counter(
        pair.caption for batch in batches(n_attack=0) for pair in batch if pair.place == 3
    )
    assert set(drawn) == {"caption 3", "other 3"}


def test_equal_captions_do_not_meet_if_they_must_be_avoided():
    texts = [(f"caption {i % 12}",) for i in range(40)]
    drawn = batches(captions=texts, n_attack=0, duplicates="avoid")
    assert all(len({pair.caption for pair in batch}) == 8 for batch in drawn)
    seen = Counter(pair.place for batch in drawn for pair in batch)
    assert set(seen) == set(range(40))
    assert max(seen.values()) - min(seen.values()) <= 3
    met = batches(captions=texts, n_attack=0)
    assert any(len({pair.caption for pair in batch}) < 8 for batch in met)


def test_another_caption_is_used_if_the_drawn_one_is_taken():
    texts = [("the same", f"its own {i}") for i in range(40)]
    drawn = batches(captions=texts, n_attack=0, duplicates="avoid", n=5)
    assert [len({pair.caption for pair in batch}) for batch in drawn] == [8] * 5
    assert len({pair.place for batch in drawn for pair in batch}) == 40


def test_too_few_distinct_captions_are_an_error():
    with pytest.raises(UserError, match=r"8 images with distinct.*share"):
        batches(captions=[(f"caption {i % 7}",) for i in range(40)], n_attack=0, duplicates="avoid")


def test_a_share_that_leaves_nothing_of_a_set_is_refused():
    with pytest.raises(UserError, match=r"attack_share is 1\.0"):
        sampler(attack_share=1.0)
    with pytest.raises(UserError, match="0 from the attack set"):
        sampler(attack_share=0.01)
