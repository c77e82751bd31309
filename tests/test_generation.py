"""Decoding: batches give what rows get alone; sampling against its definition."""

import pytest
import torch
from conftest import random_aligner, tiny_config

from lit_llama.decoder import Decoder, GenerationRequest
from lit_llama.generation import complete, generate
from lit_llama.sampling import Sampling, sample
from lit_llama.seam import LayerAdapter


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
        GenerationRequest([3 + 5 * i, 7, 11 + i][: 1 + i % 3], adapters[i % 4], max_new_tokens=1 + 7 * i % 30)
        for i in range(12)
    ]
    requests.append(GenerationRequest(list(range(50)), adapters[1], max_new_tokens=100))
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
        return GenerationRequest(
            [5, 6], None, 12, temperature=1.5, top_k=40, generator=torch.Generator().manual_seed(seed)
        )

    def run(requests):
        decoder = Decoder(tiny_model, len(requests), 64)
        rows = {number: [] for number in decoder.join(requests)}
        while decoder.running:
            for event in decoder.step():
                rows[event.row].append(event.token)
        return list(rows.values())

    first, greedy, second = run([request(1), GenerationRequest([5, 6], None, 12), request(2)])
    assert [first] == run([request(1)])
    assert [second] == run([request(2)])
    assert first != second
    assert greedy == naive_greedy(tiny_model, [5, 6], 12, None)


class Counted:
    """An adapter that counts how often it is asked what it adds."""

    def __init__(self, adapter):
        self.adapter, self.asked = adapter, 0

    def layer(self, index):
        self.asked += 1
        return self.adapter.layer(index)


def test_a_row_has_nothing_to_do_with_others_that_join_and_leave(tiny_model):
    """What its adapter adds is worked out once; others only move or add rows of tensors."""
    config = tiny_model.config
    adapters = [Counted(random_aligner(config, n, start_layer=n % 2, init_std=1.0)) for n in (1, 3, 3, 1)]
    requests = [GenerationRequest([5 + i, 6], adapter, 6 + 5 * i) for i, adapter in enumerate(adapters)]
    decoder, found = Decoder(tiny_model, max_rows=4, length=64), {}
    for request in [*requests, None]:
        for number in decoder.join([request]) if request else []:
            found[number] = []
        for _ in range(3 if request else 40):
            for event in decoder.step() if decoder.running else []:
                found[event.row].append(event.token)
    assert [adapter.asked for adapter in adapters] == [config.n_layer] * 4
    assert list(found.values()) == [
        naive_greedy(tiny_model, row.prompt, row.max_new_tokens, row.adapter) for row in requests
    ]


def overflowing(config):
    """An Aligner of finite values with which keys, values and logits are infinite or NaN."""
    aligner = random_aligner(config, 2, start_layer=1)
    torch.nn.init.constant_(aligner.tokens, 3e38)
    torch.nn.init.constant_(aligner.gates, 1.0)
    return aligner


class Broken:
    """An adapter that raises an error, in the first layer or in a later one."""

    def __init__(self, layers):
        self.left = layers

    def layer(self, index):
        if self.left == 0:
            raise RuntimeError("the adapter is broken")
        self.left -= 1
        return random_aligner(tiny_config(), 1).layer(index)


def run_all(decoder, requests):
    """Let rows join together and all rows end; tokens and last event of those that joined."""
    numbers = decoder.join(requests)
    tokens, last = {number: [] for number in decoder.running}, {}
    while decoder.running:
        for event in decoder.step():
            tokens[event.row] += [] if event.token is None else [event.token]
            last[event.row] = event
    return [tokens[number] for number in numbers], [last[number] for number in numbers]


def assert_clean(decoder):
    """As a new one: no rows, and nothing kept of any."""
    assert not any((decoder.running, decoder._requests, decoder._generated, decoder._errors))
    for layer in decoder._cache.layers:
        for row, written in enumerate(decoder._written):
            assert not layer.k[row, :, written:].any()
            assert not layer.v[row, :, written:].any()


def test_rows_leave_nothing_behind(tiny_model):
    """What a row left in the cache has weight 0 for the next one there; 0 times infinity or NaN would be NaN."""
    short = GenerationRequest([5, 6, 7], None, 8)
    decoder = Decoder(tiny_model, 1, 200)
    [expected], _ = run_all(decoder, [short])
    [tokens], [end] = run_all(decoder, [GenerationRequest(list(range(55)), overflowing(tiny_model.config), 8)])
    assert (tokens, end.token, end.finish) == ([], None, "error")
    assert "logits are not finite" in end.error
    assert run_all(decoder, [short])[0] == [expected]
    assert expected == naive_greedy(tiny_model, [5, 6, 7], 8, None)
    assert_clean(decoder)


@pytest.mark.parametrize("bad", ["overflowing", "broken", "broken later", "other sizes"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_one_row_raises_ends_it_alone(tiny_model, bad, place):
    """In the prompt or later, wherever the row stands among others that have joined with it or before."""
    aligners = [random_aligner(tiny_model.config, n, start_layer=1, init_std=1.0) for n in (1, 2)]
    good = [
        GenerationRequest([5, 6], aligners[0], 12),
        GenerationRequest(list(range(20)), aligners[1], 9),
        GenerationRequest([8], None, 30),
    ]
    adapters = {
        "overflowing": overflowing(tiny_model.config),
        "broken": Broken(1),
        "broken later": Broken(tiny_model.config.n_layer - 1),
        "other sizes": random_aligner(tiny_config(n_embd=64), 1),
    }
    broken = GenerationRequest([3, 4, 5, 6], adapters[bad], 12)
    decoder = Decoder(tiny_model, 5, 200)
    decoder.join([GenerationRequest([9, 9], None, 40)])
    decoder.step()
    tokens, ends = run_all(decoder, [*good[:place], broken, *good[place:]])
    end = ends.pop(place)
    assert len(tokens.pop(place)) <= 1
    assert (end.token, end.finish) == (None, "error")
    assert end.error
    assert tokens == [naive_greedy(tiny_model, row.prompt, row.max_new_tokens, row.adapter) for row in good]
    assert [end.finish for end in ends] == ["length"] * 3
    assert_clean(decoder)


def test_padding_does_not_reach_a_row(tiny_model):
    """A row that joins with a longer one is computed beyond its end too, and what that writes is cleared."""
    tiny_model.lm_head = torch.nn.Linear(32, 96, bias=False).requires_grad_(False)
    tiny_model.transformer.wte.weight[0] = torch.inf  # the token that others pad with
    decoder = Decoder(tiny_model, 2, 64)
    decoder.join([GenerationRequest([5, 6], None, 8), GenerationRequest([8] * 30, None, 8)])
    assert [event.finish for event in decoder.step()] == [None, None]
    assert decoder._written == [2, 30]
    assert decoder._cache.layers[-1].k[0, :, 1].any()
    for layer in decoder._cache.layers:
        assert not layer.k[0, :, 2:].any()
        assert not layer.v[0, :, 2:].any()


class Closure:
    """An update that is no named tuple of tensors, so that it cannot be stacked for a batch."""

    def layer(self, index):
        return LayerAdapter(updates={"q": (lambda x, y: 0.5 * y,)})


def test_updates_that_cannot_be_stacked_need_a_batch_of_their_own(tiny_model):
    closure, request = Closure(), GenerationRequest([5, 6], None, 10)
    expected = naive_greedy(tiny_model, [5, 6], 10, closure)
    assert generate(tiny_model, [[5, 6]] * 2, 10, adapter=closure) == [expected] * 2
    tokens, ends = run_all(Decoder(tiny_model, 2, 64), [request._replace(adapter=closure), request])
    assert tokens == [[], naive_greedy(tiny_model, [5, 6], 10, None)]
    assert "an update is a function; rows of a batch need named tuples of tensors" in ends[0].error
    decoder = Decoder(tiny_model, 2, 64)  # and one that runs keeps it when others would join
    [first] = decoder.join([request._replace(adapter=closure)])
    found = [event.token for event in decoder.step()]
    decoder.join([request])
    while decoder.running:
        for event in decoder.step():
            assert event.row == first or event.finish == "error"
            found += [event.token] if event.row == first else []
    assert found == expected


def test_callers_for_whole_texts_get_the_error(tiny_model):
    bad = overflowing(tiny_model.config)
    with pytest.raises(ValueError, match="prompt 2 cannot be continued: the model's logits are not finite"):
        generate(tiny_model, [[5], [6]], 4, adapter=[None, bad])
    requests = [GenerationRequest([5], None, 4), GenerationRequest([6], Broken(0), 4)]
    with pytest.raises(ValueError, match="prompt 2 cannot be continued: RuntimeError: the adapter is broken"):
        list(complete(tiny_model, requests, 1))


def test_cold_sampling_is_greedy(tiny_model):
    """At any temperature below 1e-5, down to those that are zero in float32; the same at a little above."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[0] *= 1e30
    for temperature in (1e-310, 5e-324, 1e-45, 1e-38, 1e-20, 9.9e-6, 1e-5):
        assert sample(logits, [Sampling(temperature)] * 4).tolist() == logits.argmax(-1).tolist()
        request = GenerationRequest([5, 6, 7], None, 8, temperature=temperature)
        tokens, [end] = run_all(Decoder(tiny_model, 1, 64), [request])
        assert (tokens, end.finish) == ([naive_greedy(tiny_model, [5, 6, 7], 8, None)], "length")


def test_impossible_requests_are_refused(tiny_model):
    with pytest.raises(ValueError, match="the prompt has 64 tokens, the model's window is 64"):
        generate(tiny_model, [[1] * 64], 5)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny_model, [[1], []], 5)
    with pytest.raises(ValueError, match="tokens from -1 to 96, the model knows 96"):
        generate(tiny_model, [[-1, 96]], 5)
    for options, name in (
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
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
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0)} | options
    tokens = sample(logits, [Sampling(**options)] * draws)
    shares = torch.bincount(tokens, minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor(expected).float(), atol=0.015, rtol=0)


def kept_by_definition(logits, sampling):
    """Tokens that may be drawn, with their probabilities, in Python's own numbers."""
    logits = logits.double() / sampling.temperature
    weights = (logits - logits.max()).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if sampling.top_k is not None:
        order = [token for token in order if weights[token] >= weights[order[min(sampling.top_k, len(order)) - 1]]]
    total, before, least = sum(weights[token] for token in order), 0.0, 0.0
    for token in order:
        if before < sampling.top_p * total:
            least = weights[token]
        before += weights[token]
    kept = {token: weights[token] for token in order if weights[token] >= least}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_rows_are_sampled_in_one_pass_as_alone(spread):
    """Flat, usual and peaked distributions of a vocabulary that is no multiple of anything, ties among them."""
    random = torch.Generator().manual_seed(1)
    choices = [(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 50, 1.0), (1.0, None, 0.9), (1.3, None, 0.999), (0.5, 7, 0.6)]
    logits = (spread * torch.randn(len(choices), 5003, generator=random)).bfloat16()

    def rows(seed):
        return [Sampling(*one, torch.Generator().manual_seed(seed + i)) for i, one in enumerate(choices)]

    drawn = [sample(logits, rows(seed)).tolist() for seed in range(0, 1000, 10)]
    alone = [sample(logits[i : i + 1], [row]).item() for i, row in enumerate(rows(0))]
    backwards = sample(logits.flip(0), rows(0)[::-1]).tolist()[::-1]
    assert drawn[0] == alone == backwards
    for i, tokens in enumerate(zip(*drawn, strict=True)):
        kept = kept_by_definition(logits[i], rows(0)[i]) if i else {int(logits[0].argmax()): 1.0}
        assert set(tokens) <= kept.keys()
        if len(kept) > 1:  # the tokens in their order, each as wide as its probability: the mean place is the middle
            ends = torch.tensor([kept.get(token, 0.0) for token in range(logits.size(1))]).cumsum(0)
            places = torch.tensor([ends[token] - kept[token] / 2 for token in tokens])
            assert abs(places.mean() - 0.5) < 4 * (1 / 12 / len(tokens)) ** 0.5


def test_seed_decides_the_sample(tiny_model):
    def once(seed):
        return generate(tiny_model, [[1, 2]], 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert once(1) == once(1) != once(2)
