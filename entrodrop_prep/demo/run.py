"""The whole path on real input: this Python's own library, scored, masked for four epochs, and trained on.

Nothing is downloaded: the corpus is the standard library's source (files the shipped model was not trained on), the
reference model is beside this file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrodrop_prep.config import MaterializeConfig, ScoreConfig
from entrodrop_prep.demo.corpus import write_corpus
from entrodrop_prep.errors import ConfigError, IntegrityError, ModelError
from entrodrop_prep.export.card import aligned, epoch_table
from entrodrop_prep.export.job import open_job
from entrodrop_prep.export.materialize import materialize
from entrodrop_prep.masking.assembly import MaskedColumns
from entrodrop_prep.scoring.run import score
from entrodrop_prep.sources.given_paths import kind_of
from entrodrop_prep.store.disk import check_held, check_regular, held, scratch
from entrodrop_prep.store.shards import local_directory
from entrodrop_prep.verification.report import report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = Path(__file__).parent / "model"
EPOCHS = 4
MAX_TOKENS = 300_000
SHOWN_TOKENS = 170
SHOWN_FROM = 40
STEPS = 6
BATCH_ROWS = 4
SHADE = "░"


def demo(out: str) -> None:
    """Run the demo into ``out`` and print what happens. Running it again continues, and shows the same.

    Raises:
        EntrodropError: no standard library source, no disk space, or a package that the demo needs is missing.
    """
    started = time.monotonic()
    directory = local_directory(out)
    _require_accelerate()
    if kind := kind_of(str(directory)):
        raise ConfigError(f"it is a {kind} directory", where=out, fix="choose another --out")
    with held(directory):  # what follows goes there or nowhere
        _demo(directory, started)


def _demo(directory: Path, started: float) -> None:
    corpus = directory / "corpus.jsonl"
    tokenizer = _tokenizer(MODEL)
    if not check_regular(corpus):
        write_corpus(corpus, tokenizer, MAX_TOKENS)
    _say("1. score: exact entropy of every token, by a frozen reference model")
    scored = score(
        ScoreConfig(
            source=str(corpus),
            model=str(MODEL),
            backend="transformers",
            out=str(directory / "scored"),
            dtype="float32",
            id_column="name",
            rows_per_shard=16,
            max_length=512,
            batch_tokens=2048,
        )
    )
    print(f"{scored.counts['rows']} documents, {scored.counts['tokens']:,} tokens")

    _say(f"2. materialize: {EPOCHS} epochs, more low-entropy tokens dropped each time")
    config = MaterializeConfig(scored=str(directory / "scored"), out=str(directory / "masked"), epochs=EPOCHS)
    print("\n".join(aligned(epoch_table(materialize(config).epochs))))

    _say(f"3. what it drops: one stretch of source, dropped tokens shaded ({SHADE})")
    _show_stretch(config, tokenizer)

    _say("4. train: transformers.Trainer on the first and the last epoch, files read as they are")
    for epoch in (0, EPOCHS - 1):
        _train(directory, epoch, tokenizer)
    print("the two losses are means over different labels: the last epoch has lost the easy ones")
    _say("5. look at it: one page with the scores, the masks of every epoch, and rows token by token")
    page = report(directory / "masked", directory / "report.html", against=[str(directory / "scored")])
    print(f"wrote {page}")
    print(
        f"\ndone in {time.monotonic() - started:.0f} s; look at {directory}: "
        f"`entrodrop inspect {directory}/masked`, `entrodrop verify {directory}/masked --against {directory}/scored`"
    )


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _require_accelerate() -> None:
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            "the demo trains with transformers.Trainer, which needs accelerate",
            fix="in the checkout: pip install '.[demo]'",
        )


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory))
    return loaded


def _show_stretch(config: MaterializeConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """One stretch of a document as it is, and as some of the epochs have it: the longest one of the first shard."""
    window = slice(SHOWN_FROM, SHOWN_FROM + SHOWN_TOKENS)
    job = open_job(config)
    job.plan(range(EPOCHS))
    with scratch() as tmp:
        job.open(tmp)
        rows = job.rows
        number = int(np.argmax(rows.columns.lengths[: job.directories[0].files[0]["rows"]]))

        def made(order_of: int, epoch: int | None) -> MaskedColumns:
            return rows.epoch(epoch)[np.flatnonzero(rows.order(order_of).index == number)].stored

        whole = made(0, None)
        ids = whole.input_ids[window]
        print(f"\n-- every token trained on\n{tokenizer.decode(ids)}")
        for epoch in (0, EPOCHS // 2, EPOCHS - 1):
            dropped = (made(epoch, epoch).labels != whole.labels)[window]
            pieces = [str(tokenizer.decode([int(i)])) for i in ids]
            text = "".join(_shaded(p) if d else p for p, d in zip(pieces, dropped, strict=True))
            print(f"\n-- epoch {epoch}: {dropped.mean():.0%} of these dropped\n{text}")


def _shaded(text: str) -> str:
    """The text with everything visible in it shaded; line ends stay, so that the shape of the code does too."""
    return "".join(c if c == "\n" else SHADE for c in text)


def _train(directory: Path, epoch: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """A few steps on one epoch's files; raises IntegrityError unless what reached the model is what they hold."""
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback

    check_held(directory)
    disable_progress_bars()
    set_seed(0)
    rows = load_dataset(
        str(directory / "masked"), f"epoch_{epoch:03d}", split="train", cache_dir=str(directory / "cache")
    )
    model: Any = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32)
    seen: list[tuple[Any, Any]] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append((inputs["input_ids"].clone(), inputs["labels"].clone())),
        with_kwargs=True,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory / "trained"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_ROWS,
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            logging_steps=STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    hook.remove()
    labels = _compare(rows, seen)
    print(
        f"epoch {epoch}: {STEPS} steps, mean loss {loss:.3f} over {labels:,} labels; every id and label that reached "
        "the model is the file's"
    )


def _compare(rows: Any, seen: list[tuple[Any, Any]]) -> int:
    """Number of labels the model saw. Raises IntegrityError if any row came otherwise than the files have it."""
    position = labels_left = 0
    for ids, labels in seen:
        for row_ids, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
            want = rows[position]
            length = len(want["input_ids"])
            same = row_ids[:length] == want["input_ids"] and row_labels[:length] == want["labels"]
            if not same or any(label != -100 for label in row_labels[length:]):
                raise IntegrityError(
                    f"row {position} did not reach the model as written", fix="please report this as a bug"
                )
            labels_left += sum(label != -100 for label in row_labels)
            position += 1
    return labels_left
