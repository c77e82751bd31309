"""Decoding: batches give what rows get alone; sampling against its definition."""

import pytest
import torch
from conftest import random_aligner

from lit_llama.generation import Decoder, Request, generate, sample


@pytest.fixture
def aligner(tiny_model):
    return random_aligner(tiny_model.config, 3, start_layer=2)


def naive_greedy(model, prompt, n, adapter, stop_ids=frozenset()):
    """Greedy decoding by its definition, without a cache."""
    ids = list(prompt)
    for _ in range(n):
        if len(ids) > model.config.block_size:
            break
        token = model(torch.tensor([ids[-model.config.block_size :]]), adapter)[0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapted", [False, True])
def test_batch_is_what_each_row_gets_alone(tiny_model, aligner, adapted):
    adapter = aligner if adapted else None
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [13]]
    expected = [naive_greedy(tiny_model, prompt, 10, adapter) for prompt in prompts]
    assert generate(tiny_model, prompts, 10, adapter=adapter) == expected
    assert min(len(set(row)) for row in expected) > 3  # rows that repeat themselves would prove little


def test_rows_end_at_their_stop_token(tiny_model, aligner):
    prompts = [[5, 6], [7, 8, 9, 10], [13]]
    free = [naive_greedy(tiny_model, prompt, 12, aligner) for prompt in prompts]
    stop = frozenset([free[0][4]])
    expected = [naive_greedy(tiny_model, prompt, 12, aligner, stop) for prompt in prompts]
    assert generate(tiny_model, prompts, 12, adapter=aligner, stop_ids=stop) == expected
    assert len(expected[0]) < 12


def test_rows_end_where_the_window_does(tiny_model):
    """A row gets as many tokens as the window has room for, whatever the length of the others."""
    long, short = list(range(60)), [1, 2, 3]
    rows = generate(tiny_model, [long, short], 20)
    assert rows == [naive_greedy(tiny_model, long, 20, None)[:4], naive_greedy(tiny_model, short, 20, None)]


def test_rows_join_and_leave(tiny_model):
    """Whoever else is in the batch, before, during and after: each row is what it is alone."""
    adapters = [None, *(random_aligner(tiny_model.config, n, start_layer=n % 3, init_std=1.0) for n in (1, 2, 5))]
    requests = [
        Request([3 + 5 * i, 7, 11 + i][: 1 + i % 3], adapters[i % 4], max_new_tokens=1 + 7 * i % 30) for i in range(12)
    ]
    requests.append(Request(list(range(50)), adapters[1], max_new_tokens=100))
    decoder, found, finished = Decoder(tiny_model, max_rows=4, length=200), {}, {}
    waiting = list(requests)
    steps = 0
    while waiting or decoder.running:
        room = min(4 - len(decoder.running), 1 + steps % 3)
        if room and waiting:
            for number in decoder.join(waiting[:room]):
                found[number] = []
            waiting = waiting[room:]
        for event in decoder.step():
            found[event.row] += [] if event.token is None else [event.token]
            if event.finish:
                finished[event.row] = event.finish
        steps += 1
    for number, request in enumerate(requests):
        expected = naive_greedy(tiny_model, request.prompt, request.max_new_tokens, request.adapter)
        assert found[number] == expected[: tiny_model.config.block_size - len(request.prompt)]
    assert set(finished.values()) == {"length"}
    assert sorted(finished) == list(range(len(requests)))


def test_rows_sample_for_themselves(tiny_model):
    """With a generator of its own, a row's text does not depend on the others; greedy rows stay greedy."""

    def request(seed):
        return Request([5, 6], None, 12, temperature=1.5, top_k=40, generator=torch.Generator().manual_seed(seed))

    def run(requests):
        decoder = Decoder(tiny_model, len(requests), 64)
        rows = {number: [] for number in decoder.join(requests)}
        while decoder.running:
            for event in decoder.step():
                rows[event.row].append(event.token)
        return list(rows.values())

    first, greedy, second = run([request(1), Request([5, 6], None, 12), request(2)])
    assert [first] == run([request(1)])
    assert [second] == run([request(2)])
    assert first != second
    assert greedy == naive_greedy(tiny_model, [5, 6], 12, None)


def test_impossible_requests_are_refused(tiny_model):
    with pytest.raises(ValueError, match="the prompt has 64 tokens, the model's window is 64"):
        generate(tiny_model, [[1] * 64], 5)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny_model, [[1], []], 5)
    for options, name in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(ValueError, match=name):
            generate(tiny_model, [[1]], 5, **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny_model, [[1]], 0)


# Probabilities 0.5, 0.25, 0.15, 0.1 in scrambled order.
PROBABILITIES = torch.tensor([0.15, 0.5, 0.1, 0.25])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 9}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # 0.5 alone holds too little
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, (PROBABILITIES**2 / (PROBABILITIES**2).sum()).tolist()),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_sampling_follows_its_distribution(options, expected):
    draws = 20_000
    logits = PROBABILITIES.log().expand(draws, -1)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    shares = torch.bincount(tokens, minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor(expected).float(), atol=0.015, rtol=0)


def test_seed_decides_the_sample(tiny_model):
    def once(seed):
        return generate(tiny_model, [[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert once(1) == once(1) != once(2)
