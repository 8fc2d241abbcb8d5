"""Preference pairs: what is in a row, what a row costs, and the loss against trl's DPOTrainer."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import WORDS, write_tokenizer

from model.checkpoint import weights_digest
from model.losses import IGNORED, PairBatch, PreferenceLoss, dpo_loss, pair_logps
from model.model import MiniMindForCausalLM
from model.pairs import PairData, dpo_data, encode_pair, padded_pairs, pair_store
from model.runtime import Runtime, setup
from model.tokenizer import EOS_ID, Tokenizer

Build = Callable[..., MiniMindForCausalLM]
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB))


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return setup("cpu", "float32", 0)


def quiet(line: str) -> None:
    """Take the place of print."""


def write_pairs(path: Path, n: int, *, n_questions: int | None = None) -> Path:
    """Write pairs with answers of one to six words, none equal to the other."""
    words = WORDS.split()
    rows = []
    for i in range(n):
        number = i % (n_questions or n)
        question = " ".join(words[(number + k) % len(words)] for k in range(1 + number % 4))
        chosen = " ".join(words[(3 * i + k) % len(words)] for k in range(1 + i % 6))
        rejected = " ".join(words[(5 * i + k) % len(words)] for k in range(1 + (i + 2) % 5))
        prompt: str | list[dict[str, str]] = f"{question} {number}"
        if number % 3 == 0:  # a question after an earlier turn, whose answer is not trained
            texts = zip(("user", "assistant", "user"), ("山", f"a {number}", prompt), strict=True)
            prompt = [{"role": role, "content": text} for role, text in texts]
        row = {"prompt": prompt, "chosen": chosen}
        rows.append(row | {"rejected": f"{rejected} no"})
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return path


def make(
    tmp_path: Path, tokenizer: Tokenizer, n: int = 30, max_seq_len: int = 64, **options
) -> PairData:
    path = write_pairs(tmp_path / "pairs.json", n)
    return dpo_data(path, tokenizer, max_seq_len, log=quiet, **options)


# ----------------------------------------------------------------------------- what is in a row


def test_each_sequence_is_the_chat_text_and_only_its_answer_is_trained(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = json.loads(write_pairs(tmp_path / "p.json", 30).read_text("utf-8"))
    data = dpo_data(tmp_path / "p.json", tokenizer, 64, log=quiet)
    assert data.n_rows < 30, "rows hold several pairs"
    found = Counter()
    for number in range(data.n_rows):
        batch = data.batch(np.array([number]))
        ids = [0, *batch.targets[0].tolist()]
        inputs = batch.inputs[0].tolist()
        texts = []
        for sequence in range(2 * batch.n_units):
            here = (batch.sequence_ids[0] == sequence).nonzero().flatten().tolist()
            answer = [ids[t + 1] for t in here if ids[t + 1] != IGNORED]
            assert answer[-1] == EOS_ID
            prompt = [inputs[t + 1] if t + 1 < len(inputs) else 0 for t in here][: -len(answer)]
            texts.append((tokenizer.decode(prompt), tokenizer.decode(answer)))
        for (prompt, chosen), (same, rejected) in zip(texts[::2], texts[1::2], strict=True):
            assert prompt == same
            found[prompt, chosen, rejected] += 1
    held_out = {int(i) for i in data.held_out[1]}
    expected = Counter()
    for i, row in enumerate(rows):
        if i not in held_out:
            # <s> itself is a sequence's first input, never a target
            turns = row["prompt"]
            if isinstance(turns, str):
                turns = [{"role": "user", "content": turns}]
            prompt = "".join(f"{turn['role']}\n{turn['content']}\n" for turn in turns)
            prompt += "assistant\n"
            expected[prompt, row["chosen"], row["rejected"]] += 1
    assert found == expected


@pytest.mark.parametrize("use_moe", (False, True))
def test_packed_pairs_have_the_log_probabilities_they_have_alone(
    build: Build, tmp_path: Path, tokenizer: Tokenizer, use_moe: bool
) -> None:
    """Attention stays within a sequence and positions restart."""
    model = build(vocab_size=VOCAB, use_moe=use_moe)
    data = make(tmp_path, tokenizer)
    rows = np.arange(data.n_rows)
    packed = data.batch(rows)
    positions, _, _ = data.plan.pieces(rows)
    numbers = np.searchsorted(data.store.offsets, positions, side="right") - 1
    with torch.no_grad():
        together, _ = pair_logps(model, packed)
        for place, number in enumerate(numbers.tolist()):
            for which in range(2):
                alone = one_sequence(data, number, which)
                expected = model(alone.inputs).logits.log_softmax(-1)[0]
                trained = alone.targets[0] != IGNORED
                picked = expected[trained].gather(1, alone.targets[0][trained, None]).sum()
                # sums of up to a dozen log probabilities in fp32
                torch.testing.assert_close(together[2 * place + which], picked, rtol=0, atol=1e-4)


def one_sequence(data: PairData, number: int, which: int) -> PairBatch:
    """Return the chosen (0) or rejected (1) sequence of a pair without padding."""
    both = padded_pairs(data.store, [number])
    n = int(both.token_mask[which].sum())
    return PairBatch(both.inputs[which : which + 1, :n], both.targets[which : which + 1, :n])


def test_a_row_for_each_pair_in_recipe_v1(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = make(tmp_path, tokenizer, recipe="v1")
    assert data.n_rows == 30 - len(data.held_out[1])
    assert data.batch(np.arange(4)).n_units == 4


def test_pairs_of_a_held_out_question_are_never_trained_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Twelve pairs a question: were pairs held out one by one, their questions would be seen."""
    path = write_pairs(tmp_path / "pairs.json", 6000, n_questions=500)
    store = pair_store(path, tokenizer, max_tokens=64, log=quiet)
    prompts = {}
    for number in range(store.n_documents):
        ids, mask = store.document(number), store.mask(number)
        prompts[number] = bytes(ids[: int(mask.argmax())])
    held_out = set(store.held_out.tolist())
    assert held_out
    questions = {prompts[number] for number in held_out}
    assert not questions & {prompts[n] for n in prompts if n not in held_out}


def test_both_answers_keep_the_same_prompt_when_it_is_cut(tokenizer: Tokenizer) -> None:
    """The oldest turns go first, then the question's end; never an answer."""
    prompt = [
        {"role": "user", "content": "old " * 20},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "the question 长江 " * 4},
    ]
    short, long = "山", "北京 mountain river " * 3
    for chosen, rejected in ((short, long), (long, short)):
        counts = Counter()
        ids, mask = encode_pair(prompt, chosen, rejected, tokenizer, 64, counts)
        end = mask.index(True) + len(tokenizer.encode(chosen)) + 1
        (first, first_mask), (second, second_mask) = (
            (ids[:end], mask[:end]),
            (ids[end:], mask[end:]),
        )
        assert first[: first_mask.index(True)] == second[: second_mask.index(True)]
        assert tokenizer.decode(np.array(first)[first_mask]) == chosen
        assert tokenizer.decode(np.array(second)[second_mask]) == rejected
        assert max(len(first), len(second)) <= 64
        assert "old" not in tokenizer.decode(ids)
        assert sum(counts.values()) >= 1
    counts = Counter()
    assert encode_pair(prompt, short, long * 9, tokenizer, 64, counts) == ([], [])
    assert any("alone exceeds 64 tokens" in reason for reason in counts)


# ----------------------------------------------------------------------------- the reference


def measure(data: PairData, model: MiniMindForCausalLM, runtime: Runtime) -> None:
    data.reference_digest = weights_digest(model)
    data.measure_reference(model, runtime)


def test_the_reference_is_measured_once_for_each_weights(
    build: Build, tmp_path: Path, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    data = make(tmp_path, tokenizer)
    model, other = build(vocab_size=VOCAB), build(seed=1, vocab_size=VOCAB)
    measure(data, model, runtime)
    first = data.reference.copy()

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in data.store.folder.glob("reference-*")}

    made = files()
    assert len(made) == 2  # of the rows, and of what is held out
    measure(data, model, runtime)
    assert files() == made
    measure(data, other, runtime)
    assert not np.allclose(data.reference, first)
    for content in (b"damaged", b""):
        for path in made:
            path.write_bytes(content)
        measure(data, model, runtime)
        np.testing.assert_array_equal(data.reference, first)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_what_is_trained_begins_at_its_reference_in_any_precision(
    build: Build, tmp_path: Path, tokenizer: Tokenizer, dtype: str
) -> None:
    """Measured in another layout, bf16 would round to margins as large as those to be learnt."""
    runtime, model = setup("cpu", dtype, 0), build(vocab_size=VOCAB)
    data = make(tmp_path, tokenizer, n=100)
    measure(data, model, runtime)
    batches = [data.batch(np.array([3, 1])), data.batch(np.array([0])), *data.held_out_batches()]
    for batch in batches:
        with runtime.autocast(), torch.no_grad():
            metrics = PreferenceLoss(0.1)(model, batch).metrics
        assert abs(float(metrics["margin"])) / batch.n_units < 1e-3


@pytest.mark.parametrize("is_packed", (True, False))
def test_precomputed_and_live_reference_are_the_same(
    build: Build, tmp_path: Path, tokenizer: Tokenizer, runtime: Runtime, is_packed: bool
) -> None:
    policy, reference = build(vocab_size=VOCAB), build(seed=1, vocab_size=VOCAB)
    data = make(tmp_path, tokenizer, n=30 if is_packed else 1500)

    def batches() -> list[PairBatch]:
        return [data.batch(np.arange(3))] if is_packed else data.held_out_batches()

    live = [PreferenceLoss(0.1, reference=reference)(policy, batch) for batch in batches()]
    measure(data, reference, runtime)
    stored = [PreferenceLoss(0.1)(policy, batch) for batch in batches()]
    assert live
    for one, two in zip(live, stored, strict=True):
        torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-5)
        for name in one.metrics:
            torch.testing.assert_close(one.metrics[name], two.metrics[name], rtol=1e-4, atol=1e-3)


# ----------------------------------------------------------------------------- the loss


def test_at_the_reference_the_loss_is_log_2_and_half_are_right(
    build: Build, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = build(vocab_size=VOCAB)
    batch = make(tmp_path, tokenizer).batch(np.arange(3))
    sums = PreferenceLoss(0.1, reference=model)(model, batch)
    assert float(sums.loss.detach()) / batch.n_units == pytest.approx(math.log(2), abs=1e-6)
    assert float(sums.metrics["accuracy"]) / batch.n_units == 0.5
    assert float(sums.metrics["margin"]) == 0


def test_the_loss_is_the_papers_formula_with_and_without_label_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logps, reference = (-20 * torch.rand(8, generator=generator) for _ in range(2))
    for beta, epsilon in ((0.1, 0.0), (0.5, 0.0), (0.3, 0.2)):
        losses, margins = dpo_loss(logps, reference, beta, epsilon)
        for i in range(4):
            ratio = [float(logps[2 * i + k] - reference[2 * i + k]) for k in (0, 1)]
            h = beta * (ratio[0] - ratio[1])
            right = -math.log(1 / (1 + math.exp(-h)))
            wrong = -math.log(1 / (1 + math.exp(h)))
            expected = (1 - epsilon) * right + epsilon * wrong
            assert float(losses[i]) == pytest.approx(expected, rel=1e-5)
            assert float(margins[i]) == pytest.approx(h, rel=1e-5)


def test_a_label_smoothing_of_half_or_more_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5 is not in \[0, 0\.5\)"):
        PreferenceLoss(0.1, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", (True, False))
def test_loss_and_gradients_are_trls(
    build: Build, tmp_path: Path, tokenizer: Tokenizer, is_packed: bool
) -> None:
    """``DPOTrainer`` (loss "sigmoid") pads a batch of sequences; ours is packed or padded."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    beta = 0.3
    policy, reference = build(vocab_size=VOCAB), build(seed=1, vocab_size=VOCAB)
    twin = build(vocab_size=VOCAB)
    data = make(tmp_path, tokenizer, n=12)
    if is_packed:
        rows = np.arange(data.n_rows)
        batch = data.batch(rows)
        positions = data.plan.pieces(rows)[0]
        numbers = (np.searchsorted(data.store.offsets, positions, side="right") - 1).tolist()
    else:
        numbers = list(range(12))
        batch = padded_pairs(data.store, numbers)
    sums = PreferenceLoss(beta, reference=reference)(policy, batch)
    loss = sums.loss / batch.n_units
    loss.backward()

    examples = []
    for number in numbers:
        ids, mask = data.store.document(number).tolist(), data.store.mask(number).tolist()
        n_prompt = mask.index(1)
        end = mask.index(0, n_prompt)  # where the rejected sequence begins
        parts = {"prompt_ids": ids[:n_prompt], "chosen_ids": ids[n_prompt:end]}
        examples.append(parts | {"rejected_ids": ids[end + n_prompt :]})
        assert ids[end : end + n_prompt] == ids[:n_prompt]
    folder = write_tokenizer(tmp_path / "tokenizer", VOCAB)
    theirs = AutoTokenizer.from_pretrained(folder, pad_token="<unk>", eos_token="</s>")
    settings = DPOConfig(
        str(tmp_path / "trl"), beta=beta, report_to=[], use_cpu=True, bf16=False, fp16=False
    )
    unused = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(
        twin, reference, args=settings, train_dataset=unused, processing_class=theirs
    )
    their_loss = trainer.compute_loss(twin, trainer.data_collator(examples))
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=0, atol=1e-5)
    for (name, ours), their in zip(policy.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, their.grad, rtol=1e-4, atol=1e-5, msg=name)
