from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_batch
from torch.nn.attention.flex_attention import create_mask

from lightning_dpo.scoring.layout import pack, packed_rows, separate_rows, single_row
from lightning_dpo.scoring.masks import block_mask, dense_mask
from lightning_dpo.types import CompletionBatch, PairBatch, TokenPair

TWO_PAIRS = [
    TokenPair([10, 11], [20, 21, 22], [30]),
    TokenPair([12], [23], [31, 32]),
]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
@settings(deadline=None)
def test_packing_places_every_item_once_and_overfills_no_row(lengths: list[int]) -> None:
    capacity = max(lengths)
    rows = pack(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
    # First-fit-like packings never leave two rows that would fit into one.
    assert len(rows) <= max(1, 2 * sum(lengths) / capacity)


def test_a_shared_row_is_prompt_chosen_rejected_with_positions_restarting() -> None:
    rows = packed_rows(PairBatch.from_pairs(TWO_PAIRS).completions())
    assert rows.input_ids.tolist() == [[10, 11, 20, 21, 22, 30], [12, 23, 31, 32, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 1, 2, 0, 0]]
    assert rows.completion.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 0, 0]]
    assert rows.sequence.tolist() == [[0] * 6, [1, 1, 1, 1, -1, -1]]
    # Chosen of both pairs, then rejected of both; a first token is predicted by the prompt's last one.
    assert rows.targets.tolist() == [20, 21, 22, 23, 30, 31, 32]
    assert rows.predict.tolist() == [1, 2, 3, 6, 1, 6, 8]
    assert rows.num_tokens == 10


def test_any_number_of_completions_follows_a_prompt() -> None:
    batch = CompletionBatch.from_lists([[10, 11], [12]], [[[20], [30, 31], [40]], [[21, 22]]])
    assert batch.prompt_of.tolist() == [0, 0, 0, 1]
    rows = packed_rows(batch)
    assert rows.input_ids.tolist() == [[10, 11, 20, 30, 31, 40], [12, 21, 22, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 2], [0, 1, 2, 0, 0, 0]]
    assert rows.completion.tolist() == [[0, 0, 1, 2, 2, 3], [0, 1, 1, 0, 0, 0]]
    assert rows.targets.tolist() == [20, 30, 31, 40, 21, 22]
    assert rows.predict.tolist() == [1, 1, 3, 1, 6, 7]
    assert dense_mask(rows)[0, 0, 5].int().tolist() == [1, 1, 0, 0, 0, 1]
    single = single_row(batch)
    assert single.input_ids.tolist() == [[10, 11, 20, 30, 31, 40, 12, 21, 22]]
    assert single.spans is not None
    assert single.spans.tolist() == [[2, 1, 2, 1], [1, 2, 0, 0]]


def test_short_pairs_share_a_row() -> None:
    long = TokenPair([1] * 4, [2] * 4, [3] * 4)
    rows = packed_rows(PairBatch.from_pairs([TWO_PAIRS[0], long, TWO_PAIRS[1]]).completions())
    assert rows.input_ids.shape == (2, 12)
    assert rows.input_ids[1].tolist() == [10, 11, 20, 21, 22, 30, 12, 23, 31, 32, 0, 0]
    assert rows.sequence[1].tolist() == [0] * 6 + [2] * 4 + [-1] * 2


def test_concatenated_rows_repeat_the_prompt() -> None:
    rows = separate_rows(PairBatch.from_pairs(TWO_PAIRS).completions())
    assert rows.input_ids.tolist() == [
        [10, 11, 20, 21, 22],
        [12, 23, 0, 0, 0],
        [10, 11, 30, 0, 0],
        [12, 31, 32, 0, 0],
    ]
    assert rows.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert rows.predict.tolist() == [1, 2, 3, 5, 11, 15, 16]
    assert rows.targets.tolist() == [20, 21, 22, 23, 30, 31, 32]


def test_rows_round_up_to_a_multiple() -> None:
    assert packed_rows(PairBatch.from_pairs(TWO_PAIRS).completions(), multiple=8).input_ids.shape == (2, 8)


def test_the_rejected_part_is_blind_to_the_chosen_one() -> None:
    mask = dense_mask(packed_rows(PairBatch.from_pairs(TWO_PAIRS).completions()))
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_a_window_counts_positions_not_columns() -> None:
    mask = dense_mask(packed_rows(PairBatch.from_pairs(TWO_PAIRS).completions()), window=2)
    # The rejected token stands at column 5 but position 2: it sees position 1 and itself.
    assert mask[0, 0, 5].int().tolist() == [0, 1, 0, 0, 0, 1]
    assert mask[0, 0, 4].int().tolist() == [0, 0, 0, 1, 1, 0]


def test_every_token_sees_itself_so_no_softmax_is_empty() -> None:
    mask = dense_mask(packed_rows(random_batch(5).completions()), window=3)
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_the_block_mask_says_what_the_dense_mask_says() -> None:
    rows = packed_rows(random_batch(6, longest=70).completions(), multiple=128)
    for window in (None, 5):
        block = block_mask(rows, window=window)
        width = rows.input_ids.shape[1]
        from_block = create_mask(
            block.mask_mod, B=len(rows.input_ids), H=1, Q_LEN=width, KV_LEN=width, device="cpu"
        )
        assert torch.equal(from_block, dense_mask(rows, window=window))
        # Blocks listed as computed cover all that is seen.
        seen = (
            dense_mask(rows, window=window).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).any(-1).any(-2)
        )
        computed = block.to_dense().bool()
        assert (computed | ~seen).all()
