"""Stop strings of every make, over four families of tokenizers, with models whose answers a test dictates.

Belongs here: where an answer is cut, whatever stop strings and tokens are made of, alike in one prompt, a batch, a
stream and with beams. The right answer is found by brute force on the whole text. Does not: answers of real weights
(test_local_model), a model's own stop strings (test_generation_config).
"""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_module, train_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmchain_fed import LocalModel
from llmchain_fed.model.generation.stop_strings import Settling, StopOnText, cut_at_stop, safe_length

FAMILIES = ["byte-level", "llama", "unigram", "wordpiece"]
MARK, SPECIAL, ROLE = "<stop>", "<unseen>", " <|end of turn|> "
PIECES = ["a", "b", "ab", "c", "the", "page", "é", "è", "#", "##", "###", ".", "!", "1", "12", "\n"]
LIMIT = 24


@functools.cache
def tokenizer_of(family):
    if family == "byte-level":
        tokenizer = train_tokenizer()
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_raw(family), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    tokenizer.add_tokens([MARK, AddedToken(ROLE, normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return tokenizer


def _raw(family):
    special = ["<pad>", "</s>", "<unk>"]
    if family == "llama":
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        words = [p for p in PIECES if p != "\n"]
        vocab = dict.fromkeys([*special, *bytes_, "▁", "▁▁", *words, *("▁" + w for w in words)])
        raw = Tokenizer(
            models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif family == "unigram":
        vocab = dict.fromkeys([*special, "▁", *PIECES[:-1], *("▁" + p for p in PIECES[:-1])])
        raw = Tokenizer(models.Unigram([(t, -float(i)) for i, t in enumerate(vocab)], unk_id=2))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        vocab = dict.fromkeys([*special, *PIECES[:-1], *("##" + p for p in PIECES[:7])])
        raw = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return raw


class Dictate(LogitsProcessor):
    """Makes a row's answer what its script says, then the filler for ever."""

    def __init__(self, scripts, start, filler):
        self.scripts, self.start, self.filler, self.steps = scripts, start, filler, 0

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.start
        self.steps = step + 1
        scores = torch.full_like(scores, -50.0)
        for row in range(len(scores)):
            script = self.scripts[row * len(self.scripts) // len(scores)]  # with beams, several rows each
            scores[row, script[step] if step < len(script) else self.filler] = 0.0
        return scores


def dictated(family, kind, scripts, *, end=True):
    """A model that answers the prompt of i + 1 letters with the i-th script. Its weights are never asked."""
    tokenizer = tokenizer_of(family)
    module = tiny_module(kind, len(tokenizer))
    if not end:
        module.generation_config.eos_token_id = None
    generate = module.generate

    def with_dictation(*, input_ids, attention_mask, **options):
        lengths = attention_mask.sum(1).tolist()
        chosen = [scripts[model.lengths.index(length)] for length in lengths]
        start = input_ids.shape[1] if kind == "causal" else 1
        model.dictate = Dictate(chosen, start, 1 if end else tokenizer.convert_tokens_to_ids("!"))
        processors = LogitsProcessorList([*(options.pop("logits_processor", None) or ()), model.dictate])
        return generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **options)

    module.generate = with_dictation
    if kind == "causal":
        vocabulary = len(tokenizer)

        def forward(input_ids, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **_):
            return CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, vocabulary))

        module.forward = forward
    model = LocalModel(module, tokenizer)
    if not end:
        model.tokenizer = _without_end(tokenizer)
    model.prompts = [" ".join(["1"] * (i + 1)) for i in range(len(scripts))]
    model.lengths = [len(row) for row in model.encode(model.prompts)]
    assert len(set(model.lengths)) == len(scripts)
    return model


def _without_end(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")


def cut_by_hand(text, stops):
    """The text before the stop string that is complete first, letter by letter."""
    for end in range(len(text) + 1):
        if ending := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, ending))]
    return text


def check_all_ways(model, scripts, stops, **options):
    """One prompt, a batch, a stream and beams against the whole text, cut by hand; returns the completions."""
    options = {"max_new_tokens": LIMIT} | options
    wanted = [cut_by_hand(model._decode(script), stops) for script in scripts]
    batch = model.complete(model.prompts, stop=stops, **options)
    assert [done.text for done in batch] == wanted
    for prompt, done in zip(model.prompts, batch, strict=True):
        assert model.complete([prompt], stop=stops, **options) == [done]
        pieces, returned = drained(model.stream(prompt, stop=stops, **options))
        assert "".join(pieces) == done.text
        assert returned == done
    beams = model.complete(model.prompts, stop=stops, num_beams=2, **options)
    assert [done.text for done in beams] == wanted
    return batch


def drained(stream):
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@st.composite
def cases(draw, family):
    """Scripts of any tokens, and stop strings that occur in them, nearly occur, or do not."""
    tokenizer = tokenizer_of(family)
    named = [tokenizer.convert_tokens_to_ids(t) for t in (MARK, SPECIAL, ROLE)]
    anything = st.integers(2, len(tokenizer) - 1)
    written = st.text(alphabet="ab é#.\n€😀", min_size=1, max_size=4).map(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    token = st.one_of(anything.map(lambda i: [i]), st.sampled_from(named).map(lambda i: [i]), written)
    script = st.lists(token, min_size=1, max_size=8).map(lambda parts: list(itertools.chain(*parts))[: LIMIT - 4])
    scripts = draw(st.lists(script, min_size=2, max_size=3))
    text = tokenizer.decode(
        draw(st.sampled_from(scripts)), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    at = draw(st.integers(0, max(0, len(text) - 1)))
    inside = text[at : at + draw(st.integers(1, 6))] or "x"
    free = st.text(alphabet="ab é#.\n€\ufffd", min_size=1, max_size=3)
    stops = draw(
        st.lists(
            st.one_of(st.just(inside), free, st.sampled_from([MARK, SPECIAL, ROLE, " ", "\ufffd"])),
            min_size=1,
            max_size=3,
        )
    )
    return scripts, stops


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_asking_cuts_the_whole_text(family, kind):
    @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(family))
    def check(case):
        scripts, stops = case
        check_all_ways(dictated(family, kind, scripts), scripts, stops)

    check()


@given(text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_the_first_complete_stop_string_cuts_and_what_is_shown_is_never_taken_back(text, stops):
    assert cut_at_stop(text, stops) == cut_by_hand(text, stops)
    shown = ""
    for end in range(len(text) + 1):
        begun = text[:end]
        if cut_at_stop(begun, stops) != begun:
            break
        assert begun[: safe_length(begun, stops)].startswith(shown)
        shown = begun[: safe_length(begun, stops)]
    assert cut_by_hand(text, stops).startswith(shown)


# --- one by one -----------------------------------------------------------------------------------------------------


def ids_of(family, *tokens):
    return [tokenizer_of(family).convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    ("family", "tokens", "stop", "wanted", "steps"),
    [
        # a line break is a byte token here: it counts once a token follows that is none
        ("llama", ["▁page", "<0x0A>", "a", "b", "c"], "\n", "page", 3),
        ("llama", ["▁page", "<0xE2>", "<0x82>", "<0xAC>", "b", "c"], "€", "page", 5),
        # the first token's space is stripped in a whole text, not within it
        ("llama", ["▁page", "▁page", "a"], " page", "page", 2),
        ("unigram", ["▁page", "▁page", "a"], " page", "page", 2),
        ("unigram", ["▁page", "▁", "a"], " ", "page", 2),
        # a continuation that a window begins with would read "##b" there
        ("wordpiece", [*["a"] * 20, "##b", "c", "the"], "b c", " ".join(["a"] * 20), 22),
        ("wordpiece", ["a", "##b", "#", "c"], "##", "ab # c", 5),
        ("byte-level", ["a", MARK, "b"], MARK, "a", 2),
        ("byte-level", ["a", ROLE, "b", "c"], " <|end of", "a", 2),
    ],
)
def test_an_answer_ends_as_soon_as_its_stop_string_is_certain(kind, family, tokens, stop, wanted, steps):
    script = ids_of(family, *tokens)
    model = dictated(family, kind, [script])
    done = check_all_ways(model, [script], [stop])
    assert done[0].text == wanted
    model.complete(model.prompts, stop=[stop], max_new_tokens=LIMIT)
    assert model.dictate.steps == steps


def test_a_stop_string_of_many_tokens_that_add_nothing_is_found():
    tokenizer = tokenizer_of("llama")
    nothing = tokenizer.convert_tokens_to_ids(SPECIAL)
    script = [*ids_of("llama", "a"), *ids_of("llama", "b"), *[nothing] * 15, *ids_of("llama", "c", "1", "1")]

    def finish(ids):
        return tokenizer.decode([i for i in ids if i != nothing])

    stop = StopOnText(finish, Settling(tokenizer, finish), ["bc"], 0)
    assert [n for n in range(1, len(script) + 1) if stop(torch.tensor([script[:n]]), None)[0]] == [18, 19, 20]


def test_what_reads_like_a_stop_string_out_of_its_context_ends_nothing():
    """The last tokens alone read "##b": the whole row reads "…ab"."""
    script = ids_of("wordpiece", *["a"] * 30, *["##b"] * 12, "c")
    model = dictated("wordpiece", "causal", [script])
    (done,) = model.complete(model.prompts, stop=["##"], max_new_tokens=50)
    assert done.text == " ".join(["a"] * 30) + "b" * 12 + " c"
    assert done.completion_tokens == len(script)


def test_a_byte_run_that_breaks_takes_its_line_break_with_it():
    """`<0x0A>` reads U+FFFD once an incomplete character follows it: then there was no line break."""
    script = ids_of("llama", "▁page", "<0x0A>", "<0xE2>", "a")
    model = dictated("llama", "causal", [script])
    assert check_all_ways(model, [script], ["\n"])[0].text == "page\ufffd\ufffda"


def test_a_special_token_that_answers_keep_is_a_stop_string_too(monkeypatch):
    script = ids_of("llama", "▁page", SPECIAL, "a")
    model = dictated("llama", "causal", [script])
    monkeypatch.setattr(model, "_decode", lambda ids: model.tokenizer.decode([i for i in ids if i > 1]))
    text = model.tokenizer.decode(script)
    assert SPECIAL in text
    assert check_all_ways(model, [script], [SPECIAL])[0].text == text.split(SPECIAL)[0]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_model_without_an_end_token_stops_each_row_of_a_batch_for_itself(kind):
    scripts = [
        ids_of("byte-level", *"ab", MARK, *"cd"),
        ids_of("byte-level", *"aaaaa", MARK),
        ids_of("byte-level", *"ab"),
    ]
    model = dictated("byte-level", kind, scripts, end=False)
    done = model.complete(model.prompts, stop=[MARK], max_new_tokens=9)
    assert [d.text for d in done] == ["ab", "aaaaa", "ab!!!!!!!"]
    assert [d.completion_tokens for d in done] == [3, 6, 9]
    assert [d.finish_reason for d in done] == ["stop", "stop", "length"]
    assert [model.complete([p], stop=[MARK], max_new_tokens=9)[0] for p in model.prompts] == done
    beams = model.complete(model.prompts, stop=[MARK], max_new_tokens=9, num_beams=2)
    assert [d.text for d in beams] == ["ab", "aaaaa", "ab!!!!!!!"]
