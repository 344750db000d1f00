"""The study in short: models as in transformers, rows as from the loader, figures as its runs give them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from entrodrop_prep import MaskedRows
from entrodrop_prep.errors import SourceError
from entrodrop_prep.training.losses import trainable_token_loss
from study import arms, corpus, own, page, prepare, train
from study.network import logits, of_transformers, repeated

ARMS = ["plain", "low-both", "uniform-inputs", "low-excess"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays of a toy model, of prose and of questions, by the whole path from texts on."""
    out, torch_threads = tmp_path_factory.mktemp("study"), torch.get_num_threads()
    torch.set_num_threads(1)
    prepare.prepare(
        out, ["toy"], [train.Run(a, 1e-3, s, 1) for a in ARMS for s in arms.ARMS[a].strengths], general=6000, passes=1,
        parts=dict.fromkeys(corpus.PARTS, 1500), epochs=2, domains=("prose", "task"), documents=12, vocabulary=300,
    )  # fmt: skip
    torch.set_num_threads(torch_threads)
    return out


def data_of(toy: Path, epochs: int = 2, domain: str = "prose") -> train.Data:
    files = (np.load(toy / f"arrays-{domain}-toy" / f"{name}.npz") for name in ("plain", "rows"))
    return train.Data(*(dict(f) for f in files), epochs, "cpu")


@pytest.mark.training
def test_rows_are_those_of_the_loader(toy: Path) -> None:
    data = data_of(toy)
    scored = {name: toy / f"scored-prose-{name}-toy" for name in ("train", "seen")}
    for arm, strength in (("low-both", 0.8), ("uniform-inputs", 0.1), ("low-excess", 0.4)):
        more = {"against_scores": scored["seen"]} if arm == "low-excess" else {}
        rows = MaskedRows.open(
            scored["train"], epochs=2, seed=1, shuffle="none", cache_dir=toy / "cache", **more,
            **arms.ARMS[arm].rows(strength),
        )  # fmt: skip
        for epoch in range(2):
            ids, labels = data.rows(train.Run(arm, 1e-3, strength, 1), epoch)
            for row, i, j in zip(rows.take(range(*rows.span(epoch)))["labels"], ids, labels, strict=True):
                assert j[: len(row)].tolist() == row
                assert not (j[len(row) :] + 100).any()
                assert (i[1:][j[1:] >= 0] == j[1:][j[1:] >= 0]).all() or arms.ARMS[arm].recipe["target"] != "labels"


@pytest.mark.training
def test_many_models_train_as_one_does(toy: Path) -> None:
    """Three steps of transformers' model with AdamW and the loss of this package."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(toy / "base-toy")
    data, run = data_of(toy), train.Run("low-both", 2e-3, 0.8, 1)
    decay = train.Run("weight-decay", 1e-2, 0.8, 1)
    start = train.from_base(toy / "base-toy")
    weights = repeated(start, 2, "cpu")
    ids = data.plain["train_ids"][:3]
    torch.testing.assert_close(logits(weights, ids.expand(2, -1, -1))[1], model(ids).logits, atol=2e-5, rtol=1e-4)
    next(train.trained(weights, [run, decay], data, 2))
    order = np.random.Generator(np.random.Philox(key=1)).permutation(data.shape[0])
    for at, (one, share) in enumerate(((run, 0.0), (decay, 0.8))):
        model = GPT2LMHeadModel.from_pretrained(toy / "base-toy")
        groups = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == two], "weight_decay": share * two}
            for two in (True, False)
        ]
        optimizer = torch.optim.AdamW(groups, lr=one.rate, betas=train.BETAS)
        every = data.rows(one, 0)
        for step, first in enumerate(range(0, len(order), train.BATCH), 1):
            some = torch.as_tensor(order[first : first + train.BATCH])
            loss = trainable_token_loss(model(every[0][some]).logits, every[1][some], data.trainable[some])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
            for group in optimizer.param_groups:
                group["lr"] = one.rate * min(1, step / train.WARM_UP)
            optimizer.step()
        for name, w in model.state_dict().items():
            if name != "lm_head.weight":
                torch.testing.assert_close(weights[name][at].detach(), w, atol=2e-5, rtol=1e-4)


@pytest.mark.training
def test_every_arm_runs(toy: Path, tmp_path: Path) -> None:
    runs = [train.Run(a, *arms.trials(a)[0], 1) for a in ("plain", "low-excess", "dropout", "eaft")]
    found = train.study(toy / "arrays-prose-toy", tmp_path / "out.json", runs, epochs=2, models=3)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert [len(r["test"]) for r in found["runs"]] == [3] * 4
    assert all(np.isfinite(r["test"]).all() for r in found["runs"])
    assert found["runs"][0]["test"][0] == found["runs"][3]["test"][0]
    assert found["runs"][0]["test"][2] != found["runs"][1]["test"][2]


@pytest.mark.training
def test_answers_are_those_of_transformers(toy: Path) -> None:
    """Greedy answers of a model that knows half of the questions, beside those that ``generate`` gives."""
    from transformers import GPT2LMHeadModel

    data, weights = data_of(toy, domain="task"), repeated(train.from_base(toy / "base-toy"), 1, "cpu")
    assert data.asks
    assert not data_of(toy).asks
    for name in ("ids", "labels"):
        data.plain[f"test_{name}"] = data.plain[f"train_{name}"][4:12]
        data.plain[f"train_{name}"] = data.plain[f"train_{name}"][:8]
    data.shape, data.trainable = tuple(data.plain["train_ids"].shape), data.trainable[:8]
    for _ in train.trained(weights, [train.Run("plain", 1e-2, 0.0, 1)], data, 60):
        pass
    model = GPT2LMHeadModel.from_pretrained(toy / "base-toy").eval()
    model.load_state_dict({n: w[0].detach() for n, w in weights.items()}, strict=False)
    right = ended = 0
    end = model.config.eos_token_id
    for ids, labels in zip(data.plain["test_ids"], data.plain["test_labels"], strict=True):
        first, wanted = int((labels >= 0).int().argmax()), labels[labels >= 0].tolist()
        asked = ids[None, :first]
        mask, settings = torch.ones_like(asked), {"do_sample": False, "pad_token_id": end}
        new = model.generate(asked, attention_mask=mask, max_new_tokens=train.LONGEST, **settings)[0, first:].tolist()
        right, ended = right + (new == wanted), ended + (end in new)
    assert 4 <= right < 8
    assert ended > 0
    assert train.answered(weights, data)[0].tolist() == pytest.approx([right / 8, ended / 8])


@pytest.mark.training
def test_own_model_and_rows(toy: Path, tmp_path: Path) -> None:
    """Any model of transformers gives what the study's own network gives; copies leave; the tables have every arm."""
    topics = [text for _, text in corpus.domain("prose")[:40]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text[:200]}) + "\n" for text in [*topics, *topics]), encoding="utf-8")
    runs = [r for r in train.headline(1e-3, 2) if r.arm in ("plain", "low-both", "uniform-inputs")]
    found = own.own(toy / "base-toy", data, tmp_path / "out", runs, epochs=1, max_length=64, device="cpu")
    assert [len(r["test"]) for r in found["runs"]] == [2] * len(runs)
    data.write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(SourceError, match=r"rows\.jsonl:2: broken JSON"):
        own.split(data, tmp_path)
    kept = [line for part in corpus.PARTS for line in (tmp_path / f"out/own-{part}.jsonl").read_text().splitlines()]
    assert len(kept) == len(set(kept)) <= 40
    tables = page.figures([tmp_path / "out" / "own-base_toy.json"])
    assert all(f"| {r.arm} |" in tables for r in runs)
    network, start = of_transformers(toy / "base-toy", "cpu")
    weights, ids = repeated(start, 2, "cpu"), data_of(toy).plain["train_ids"][:3].expand(2, -1, -1)
    torch.testing.assert_close(
        network(weights, ids, None),
        logits(repeated(train.from_base(toy / "base-toy"), 2, "cpu"), ids),
        atol=2e-5,
        rtol=1e-4,
    )


def test_every_trial_of_the_plan() -> None:
    assert {len(arms.trials(a)) for a in arms.ARMS} == {9}
    plan = (page.HERE / "PLAN.md").read_text(encoding="utf-8")
    assert all(name in plan for name in arms.ARMS)


def test_the_pages_name_what_was_run() -> None:
    """Figures that are typed by hand are those of the code."""
    text, readme = (path.read_text(encoding="utf-8") for path in (page.PAGE, page.HERE.parent / "README.md"))
    texts = f"{prepare.GENERAL_TOKENS:,} tokens", f"about {prepare.PARTS['train']:,} tokens"
    typed = (*texts, f"about {prepare.PARTS['test']:,} tokens", f"{arms.EPOCHS} epochs")
    assert [t for t in typed if t not in " ".join(text.split())] == []
    assert f"of {sum(not a.chats for a in arms.ARMS.values())} arms" in readme


def test_statistics() -> None:
    """Against published values: t = 2.776 at 4 degrees of freedom has p 0.05; Holm's own steps."""
    unit = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / np.sqrt(2.5)
    assert page.p_value(unit + 2.776445 / np.sqrt(5)) == pytest.approx(0.05, abs=1e-6)
    assert page.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    low, high = page.interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert 1 < low < 3 < high < 5


def test_a_table_of_known_runs(tmp_path: Path) -> None:
    """Settings are chosen on dev with the tuning seed, whose test losses are not shown; seeds are paired."""
    curves = {  # dev and test loss of each epoch
        ("plain", 0.0): ([3.0, 2.0, 2.5], [3.0, 2.1, 2.6]),
        ("low-labels", 0.4): ([3.0, 2.2, 2.4], [3.0, 2.3, 2.5]),
        ("low-labels", 0.8): ([3.0, 1.9, 2.6], [3.0, 2.0, 2.7]),
    }
    runs = []
    for (arm, strength), (dev, test) in curves.items():
        for seed in (arms.TUNING_SEED, *arms.SEEDS):
            shift = 9.0 if seed == arms.TUNING_SEED else seed / 100 * (arm == "plain")
            runs.append({"arm": arm, "rate": 1e-3, "strength": strength, "seed": seed,
                         "dev": [[v, v, v] for v in dev], "test": [[v + shift] * 3 for v in test]})  # fmt: skip
    first, _, *lines = page.table({"runs": runs})
    assert [line.split(" | ")[0] for line in lines] == ["| low-labels", "| plain"]
    low = lines[0].split(" | ")
    assert low[1:4] == ["0.001, 0.4", "2.500", "-0.130 [-0.142, -0.118]"]
    assert low[6:8] == ["0.001, 0.8", "2.000"]
    assert low[8].startswith("-0.130 ")
    assert len(first.split(" | ")) == len(low)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"runs": [r for r in runs if r["arm"] == "plain"]}), encoding="utf-8")
    assert train.again(results, 1e-3, 2) == [train.Run("plain", 1e-3, 0.0, s) for s in (1, 2)]


def test_the_page_is_what_the_results_give(tmp_path: Path) -> None:
    """And is not, once a result, a table, a figure in the text or a picture is another."""
    text = page.PAGE.read_text(encoding="utf-8")
    for path in (page.HERE / "results").glob("*.json"):
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        tuned = any(r["seed"] == arms.TUNING_SEED for r in runs)
        settings = {(r["arm"], r["rate"], r["strength"], r["seed"]) for r in runs}
        assert len(runs) == len(settings)
        assert not tuned or len(runs) == len({r["arm"] for r in runs}) * 9 * 6  # none left out
    now, drawn = page.renewed(text, page.HERE / "results")
    assert now == text
    for name, svg in drawn.items():
        assert page.PAGE.with_name(name).read_text(encoding="utf-8") == svg
        assert len(svg) < 60_000
