"""Bad input to every command and the line that it is answered with: one table.

The last part of docs/errors.md is made from it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCORE = "score rows.jsonl --model model --out out --backend transformers --device cpu"
MASK = "materialize scored --out out --epochs 2"


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        given: what is wrong, in words; empty where the command shows it.
        command: arguments of ``entrodrop``, run in a copy of ``world``.
        message: what it is answered with, behind ``error: ``; ``…`` stands for any text.
        make: what makes the files wrong.
    """

    given: str
    command: str
    message: str
    make: Callable[[], object] | None = None


def world(folder: Path) -> None:
    """``rows.jsonl``, ``model``, ``scored``, and ``masked`` made from that, all well."""
    from entrodrop_prep.config import MaterializeConfig
    from entrodrop_prep.export.materialize import materialize
    from helpers.models import save_model, tiny_llama
    from helpers.scored import some_rows, write_scored

    (folder / "rows.jsonl").write_text('{"text": "w5 w6 w7"}\n{"text": "w8 w9"}\n')
    save_model(folder / "model", tiny_llama(61, context=32))
    write_scored(folder / "scored", some_rows(24, lengths=(2, 20)))
    materialize(MaterializeConfig(scored=str(folder / "scored"), out=str(folder / "masked"), epochs=2))


def put(name: str, content: str | bytes) -> Callable[[], object]:
    """A file with this content."""
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def rows(*lines: str) -> Callable[[], object]:
    """``rows.jsonl`` with these lines."""
    return put("rows.jsonl", "".join(f"{line}\n" for line in lines))


def chat(*messages: dict[str, Any], **more: Any) -> Callable[[], object]:
    """``rows.jsonl`` of one chat."""
    return rows(json.dumps({"messages": messages, **more}))


def config(**values: Any) -> Callable[[], object]:
    """The model's config.json with other values."""

    def change() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def flipped(name: str, at: int) -> Callable[[], object]:
    """A file with one byte changed."""

    def change() -> None:
        data = bytearray(Path(name).read_bytes())
        data[at] ^= 1
        Path(name).write_bytes(data)

    return change


def said(directory: str, **values: Any) -> Callable[[], object]:
    """A manifest that says something else, with a digest that is right."""

    def change() -> None:
        from helpers.scored import rewrite_manifest

        rewrite_manifest(Path(directory), **values)

    return change


def remove(name: str) -> Callable[[], object]:
    """A file or a folder that is not there."""
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def halved(name: str) -> Callable[[], object]:
    """A file that was cut in two."""
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def table(name: str, **columns: Any) -> Callable[[], object]:
    """A Parquet file."""

    def write() -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), name)

    return write


def typed(name: str) -> Callable[[], object]:
    """A Parquet file whose column is of an extension type that has a pickle for parameters."""

    def write() -> None:
        import datasets  # noqa: F401  it registers its types, by which the same file is read
        import pyarrow as pa
        import pyarrow.parquet as pq

        given = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Trap())}
        schema = pa.schema([pa.field("text", pa.string(), metadata=given)])
        pq.write_table(pa.table([pa.array(["w5 w6 w7", "w8 w9"])], schema=schema), "a.parquet")

    return write


def broken_offsets() -> None:
    """An Arrow file of ten texts whose last one ends behind all of them."""
    import pyarrow as pa

    found = pa.table({"text": [f"w{n} w5" for n in range(10)]})
    with pa.ipc.new_file("a.arrow", found.schema) as writer:
        writer.write_table(found)
    data = Path("a.arrow").read_bytes()
    offsets = found["text"].chunk(0).buffers()[1].to_pybytes()[:44]
    assert data.count(offsets) == 1
    Path("a.arrow").write_bytes(data.replace(offsets, offsets[:40] + (2**30).to_bytes(4, "little")))


def all_of(*makers: Callable[[], object]) -> Callable[[], object]:
    """One after the other."""
    return lambda: [make() for make in makers]


class Trap:
    """What writes a file when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("sprung", "w")


def with_pickles() -> None:
    """The weights as a pickle that is a trap."""
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    os.unlink("model/model.safetensors")


def as_another(kind: str) -> Callable[[], object]:
    """A model that is no causal language model."""

    def write() -> None:
        from transformers import BertConfig, LlamaModel, T5Config, T5ForConditionalGeneration

        from helpers.models import save_model, tiny_llama

        shutil.rmtree("model") if kind != "body" else None
        if kind == "body":
            LlamaModel(tiny_llama(61)).save_pretrained("model")
        elif kind == "t5":
            small = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            T5ForConditionalGeneration(small).save_pretrained("model")
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            wide = BertConfig(vocab_size=61, max_position_embeddings=64, initializer_range=0.5, **sizes)
            save_model(Path("model"), wide)

    return write


def code() -> None:
    """Code beside a model that shows whether it was run."""
    Path("model/trap.py").write_text("open('sprung', 'w')\nclass Trap: pass\n")


def tokenizer_code() -> None:
    """A tokenizer whose code would run."""
    path = Path("model/tokenizer_config.json")
    auto = {"AutoTokenizer": [None, "trap.Trap"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto, "tokenizer_class": "Trap"}))
    code()


def model_code() -> None:
    """A model whose code would run."""
    config(auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "trap.Trap"))()
    code()


def other_tokenizer() -> None:
    """A tokenizer with other ids for the same words."""
    from helpers.models import word_tokenizer

    word_tokenizer(61, first=4).save_pretrained("tokenizer")


USER, BOT = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
DEEP = '{"text": "w5 w6", "x": ' + "[" * 700 + "]" * 700 + "}"
CHATML = f"{SCORE} --chat-template chatml"

# fmt: off
CASES: dict[str, list[Case]] = {
    "The command line": [
        Case('', 'scoer', "No such command 'scoer'. Did you mean 'score', 'serve'?"),
        Case('', '--nope', 'No such option: --nope'),
        Case('', 'score', "Missing argument 'SOURCE'."),
        Case('', 'score rows.jsonl --out out', '--model is missing; reference model: a local directory or a Hub id. It is only read.'),
        Case('', 'score rows.jsonl --modle model --out out', 'No such option: --modle (Possible options: --compile, --model)'),
        Case('', 'score rows.jsonl more.jsonl --model model --out out', 'Got unexpected extra argument(s) (more.jsonl)'),
        Case('', 'materialize scored --out out', '--epochs is missing; number of epochs to write.'),
        Case('an option of another command', 'verify scored --horizon 4', 'No such option: --horizon; it is an option of materialize'),
        Case('', 'inspect scored --row -1', "Invalid value for '--row': Input should be greater than or equal to 0"),
        Case('', 'recipe trainer masked', "unknown trainer 'trainer'; did you mean transformers?"),
        Case('', 'schema', "Missing option '--write'."),
        Case('`out` is a file', 'schema --write out', 'out/scored.json: cannot write here: File exists; choose another --out', put('out', '')),
        Case('', 'demo --out scored', 'scored: it is a scored directory; choose another --out'),
        Case('`demo-out` is a file', 'demo --out demo-out', 'demo-out: cannot write here: File exists; choose another --out', put('demo-out', '')),
    ],
    "Settings of score": [
        Case('', f'{SCORE} --limit many', "--limit 'many': input should be a valid integer, unable to parse string as an integer; see --limit in --help"),
        Case('', f'{SCORE} --limit 0', "--limit '0': input should be greater than or equal to 1; see --limit in --help"),
        Case('', f'{SCORE} --dtype float8', "Invalid value for '--dtype': 'float8' is not one of 'float32', 'bfloat16', 'float16', 'auto'."),
        Case('', f'{SCORE} --backend sglang', "Invalid value for '--backend': 'sglang' is not one of 'auto', 'transformers', 'vllm', 'server'."),
        Case('', f'{SCORE} --max-length 1', "--max-length '1': input should be greater than or equal to 2; see --max-length in --help"),
        Case('', f'{SCORE} --max-length 33', "model: --max-length 33 is over the model's context of 32 tokens; use at most 32"),
        Case('', f'{SCORE} --max-length 8 --overlap 8', '--overlap 8 is not below --max-length 8; a window must hold at least one token that the one before did not'),
        Case('', f'{SCORE} --overlap 32', '--overlap 32 is not below the longest row, 32 tokens; lower --overlap'),
        Case('', f'{SCORE} --overlap -1', "--overlap '-1': input should be greater than or equal to 0; see --overlap in --help"),
        Case('', f'{SCORE} --rows-per-shard 0', "--rows-per-shard '0': input should be greater than or equal to 1; see --rows-per-shard in --help"),
        Case('', f'{SCORE} --batch-tokens 0', "--batch-tokens '0': input should be greater than or equal to 1; see --batch-tokens in --help"),
        Case('', f'{SCORE} --prompt-column text', '--prompt-column and --completion-column go together; give both or neither'),
        Case('', f'{SCORE} --text-column text --messages-column text', '--text-column, --prompt-column/--completion-column and --messages-column exclude each other; give the columns of one row format'),
        Case('', f'{SCORE} --text-column absent', "there is no column 'absent' for --text-column; its columns are: text"),
        Case('', f'{SCORE} --id-column absent', "rows.jsonl: there is no column 'absent'; its columns are: text"),
        Case('', f'{SCORE} --keep-columns text,text', '--keep-columns names a column twice; name each column once'),
        Case('', f'{SCORE} --keep-columns input_ids', "rows.jsonl: --keep-columns cannot keep a column called 'input_ids': the scored dataset has its own; rename it in the source", rows('{"input_ids": [5, 6]}')),
        Case('', f'{SCORE} --chat-template-kwargs {{', "--chat-template-kwargs '{': is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); see --chat-template-kwargs in --help"),
        Case('', f'{SCORE} --chat-template absent.jinja', 'absent.jinja: cannot read the chat template: No such file or directory; check --chat-template'),
        Case('', f'{SCORE} --config en', 'rows.jsonl: --config en has no use with files; leave out --config'),
        Case('', f'{SCORE} --split test', 'rows.jsonl: --split test: files have no splits; leave out --split'),
        Case('', f'{SCORE} --text-rows line', 'rows.jsonl: --text-rows line has no use: it is for .txt and .text files; leave it out'),
        Case('', f'{SCORE} --worker 2/2', "--worker '2/2': 2 is not below 2; give I/N with I from 0 to N - 1, such as 0/4"),
        Case('', f'{SCORE} --backend server', '--backend server needs --server; give the URL of a server: `entrodrop serve` starts one'),
        Case('', f'{SCORE} --backend server --server http://me:secret@127.0.0.1:1', '127.0.0.1: --server: a URL must not carry a user or a password; put the key into the environment variable ENTRODROP_API_KEY'),
        Case('', f'{SCORE} --backend server --server file:///etc/passwd', "--server 'file:///etc/passwd' is not the URL of a server; write http://HOST:PORT"),
    ],
    "Sources": [
        Case('braces', "score '{rows,more}.jsonl' --model model --out out", '{rows,more}.jsonl: no such file or directory; there are no braces in patterns: give a pattern of * ? and [ab], or a directory'),
        Case('no such file', 'score absent.jsonl --model model --out out', 'absent.jsonl: no such file or directory; check the path'),
        Case('', "score '' --model model --out out", 'SOURCE is empty; give a path, a glob, a URL or a Hub dataset id'),
        Case('an empty file', SCORE, 'rows.jsonl: holds no rows; give a source with at least one row', put('rows.jsonl', '')),
        Case('only blank lines', SCORE, 'rows.jsonl: holds no rows; give a source with at least one row', put('rows.jsonl', '\n \n')),
        Case('a pipe', 'score pipe.jsonl --model model --out out', 'pipe.jsonl: is a FIFO, not a regular file; give files that can be read twice', lambda: os.mkfifo('pipe.jsonl')),
        Case('an empty folder', 'score data --model model --out out', 'data: there are no data files; known extensions: .parquet, .jsonl, .ndjson, .json, .csv, .tsv, .arrow, .txt, .text (all but Parquet and Arrow also .gz, .zst, .bz2 or .xz)', lambda: os.mkdir('data')),
        Case('a folder with nothing but a script', SCORE.replace('rows.jsonl', 'data'), 'data: there are no data files; not read: 1 of no known format (data.py); known extensions: …', all_of(lambda: os.mkdir('data'), put('data/data.py', "open('sprung', 'w')"))),
        Case('no column that could be meant', SCORE, 'no column called text, prompt and completion, instruction and output, messages, conversations or input_ids; its columns are: body, n; choose with --text-column, --prompt-column and --completion-column, or --messages-column', rows('{"body": "w5 w6", "n": 1}')),
        Case('a thousand columns, none of which could be meant', SCORE, 'no column called text, prompt and completion, instruction and output, messages, conversations or input_ids; its columns are: c0, c1, … c998, c999; choose with --text-column, --prompt-column and --completion-column, or --messages-column', rows(json.dumps({f'c{n}': n for n in range(1000)}))),
        Case('several that could be', SCORE, 'its rows can be read as plain text from text or as prompt and completion from prompt and completion; its columns are: text, prompt, completion; choose with --text-column, --prompt-column and --completion-column, or --messages-column', rows('{"text": "w5", "prompt": "w5", "completion": "w6"}')),
        Case('JSON that is no object', SCORE, 'rows.jsonl:1: its first row is no JSON object: not a JSON object but an array; give JSON lines, one object a line; plain text is read from a file called .txt', rows('[1, 2]')),
        Case('a JSON file that is cut short', SCORE.replace('rows.jsonl', 'a.json'), 'a.json:1: broken JSON array: it ends inside the array; correct the file, or give one object a line', put('a.json', '[{"text": "w5"}, {"te')),
        Case('CSV with two columns of a name', SCORE.replace('rows.jsonl', 'a.csv'), "a.csv:1: the header names 'text' twice; rename one of the columns", put('a.csv', 'text,text\nw5,w6\n')),
        Case('CSV with a quote that does not end', SCORE.replace('rows.jsonl', 'a.csv'), 'a.csv:2: row 0: broken CSV: unexpected end of data; correct it, or skip such rows with --on-bad-row skip', put('a.csv', 'text\n"w5 w6\n')),
        Case('CSV, a row with too many fields', SCORE.replace('rows.jsonl', 'a.csv'), 'a.csv:2: row 0: 2 fields where the header has 1; correct it, or skip such rows with --on-bad-row skip', put('a.csv', 'text\nw5,w6\n')),
        Case('no Parquet', SCORE.replace('rows.jsonl', 'a.parquet'), 'a.parquet: its name says Parquet, but it is something else: it does not begin with PAR1; rename it after what it is, or convert it', put('a.parquet', 'w5 w6' * 9)),
        Case('Parquet with a type of `datasets` whose parameters are a pickle', SCORE.replace('rows.jsonl', 'a.parquet'), "a.parquet: cannot be read: …; check that the file is whole and in its format", typed('datasets.features.features.Array2DExtensionType')),
        Case('Parquet that is cut short', SCORE.replace('rows.jsonl', 'a.parquet'), 'a.parquet: cannot be read: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.; check that the file is whole and in its format', all_of(table('a.parquet', text=['w5 w6'] * 50), halved('a.parquet'))),
        Case('no Arrow', SCORE.replace('rows.jsonl', 'a.arrow'), 'a.arrow: cannot be read: Expected to read 1998599543 metadata bytes, but only read 41; check that the file is whole and in its format', put('a.arrow', 'w5 w6' * 9)),
        Case('Arrow whose offsets lead out of it', SCORE.replace('rows.jsonl', 'a.arrow'), 'a.arrow: cannot be read: …; check that the file is whole and in its format', broken_offsets),
        Case('no gzip', SCORE.replace('rows.jsonl', 'a.jsonl.gz'), 'a.jsonl.gz: its name says gzip, but it is not gzip data; rename it after what it is, or convert it', put('a.jsonl.gz', '{"text": "w5"}\n')),
        Case('gzip that is cut short', SCORE.replace('rows.jsonl', 'a.jsonl.gz'), 'a.jsonl.gz: cannot be read: Compressed file ended before the end-of-stream marker was reached; check that the file is whole and in its format', put('a.jsonl.gz', gzip.compress(b'{"text": "w5 w6"}\n' * 99)[:40])),
        Case('no Zstandard', SCORE.replace('rows.jsonl', 'a.jsonl.zst'), 'a.jsonl.zst: cannot be read: ZSTD decompress failed: Unsupported frame parameter; check that the file is whole and in its format', put('a.jsonl.zst', b'(\xb5/\xfd' + b'x' * 9)),
        Case('gzip under the name of plain text', SCORE, 'rows.jsonl: its name says JSON lines (.jsonl), but it is gzip data; rename it after what it is, or convert it', put('rows.jsonl', gzip.compress(b'{}'))),
        Case('a format that is not read', SCORE.replace('rows.jsonl', 'a.xlsx'), 'a.xlsx: has no known data format; known extensions: .parquet, .jsonl, .ndjson, .json, .csv, .tsv, .arrow, .txt, .text (all but Parquet and Arrow also .gz, .zst, .bz2 or .xz)', put('a.xlsx', 'x')),
        Case('text that is no UTF-8', SCORE.replace('rows.jsonl', 'a.txt'), 'a.txt: row 0: invalid UTF-8: byte 0xff in line 1 at column 3; correct it, or skip such rows with --on-bad-row skip', put('a.txt', b'w5\xff\n')),
    ],
    "Rows": [
        Case('text is a number', SCORE, "rows.jsonl:2: row 1: column 'text' holds a number, not a string; correct it, or skip such rows with --on-bad-row skip", rows('{"text": "w5 w6"}', '{"text": 5}')),
        Case('text is null', SCORE, "rows.jsonl:2: row 1: column 'text' holds null, not a string; correct it, or skip such rows with --on-bad-row skip", rows('{"text": "w5 w6"}', '{"text": null}')),
        Case('text is a list', SCORE, "rows.jsonl:2: row 1: column 'text' holds a list of string, not a string; correct it, or skip such rows with --on-bad-row skip", rows('{"text": "w5 w6"}', '{"text": ["w5"]}')),
        Case('JSON that ends too early', SCORE, "rows.jsonl:2: row 1: broken JSON: Expecting ',' delimiter at column 1; correct it, or skip such rows with --on-bad-row skip", rows('{"text": "w5 w6"}', '{"text": "w5"')),
        Case('JSON nested 700 deep', SCORE, 'rows.jsonl:2: row 1: JSON nested more than 500 levels deep; correct it, or skip such rows with --on-bad-row skip', rows('{"text": "w5 w6"}', DEEP)),
        Case('half a surrogate pair', SCORE, 'rows.jsonl:2: row 1: a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; correct it, or skip such rows with --on-bad-row skip', rows('{"text": "w5 w6"}', '{"text": "\\ud800"}')),
        Case('no UTF-8', SCORE, 'rows.jsonl:2: row 1: invalid UTF-8: byte 0xff at column 12; correct it, or skip such rows with --on-bad-row skip', put('rows.jsonl', b'{"text": "w5"}\n{"text": "w\xff6"}\n')),
        Case('a row of 90 bytes', f'{SCORE} --max-row-bytes 50', "--max-row-bytes '50': input should be greater than or equal to 1024; see --max-row-bytes in --help", rows('{"text": "' + 'w5 ' * 30 + '"}')),
        Case('ids are null', SCORE, "rows.jsonl:2: row 1: column 'input_ids' holds null, not a list of whole numbers; correct it, or skip such rows with --on-bad-row skip", rows('{"input_ids": [5, 6]}', '{"input_ids": null}')),
        Case('ids are no integers', SCORE, "rows.jsonl:2: row 1: column 'input_ids' is not a list of whole numbers: entry 1 is 6.5; correct it, or skip such rows with --on-bad-row skip", rows('{"input_ids": [5, 6]}', '{"input_ids": [5, 6.5]}')),
        Case('an id below 0', SCORE, "rows.jsonl:2: row 1: column 'input_ids': entry 1 is -1, not from 0 to 2147483647; correct it, or skip such rows with --on-bad-row skip", rows('{"input_ids": [5, 6]}', '{"input_ids": [5, -1]}')),
        Case('an id that the model does not have', SCORE, 'rows.jsonl:1: row 0: token id 61 at position 1 is out of the vocabulary of 61 tokens; correct it, or skip such rows with --on-bad-row skip', rows('{"input_ids": [5, 61]}')),
        Case('labels of another length', SCORE, "rows.jsonl:1: row 0: column 'labels' has 1 entries for 2 input ids; correct it, or skip such rows with --on-bad-row skip", rows('{"input_ids": [5, 6], "labels": [5]}')),
        Case('rows that are padded', SCORE, "rows.jsonl:1: row 0: it is padded: it ends with id 0, the tokenizer's pad token, 2 times; give rows without padding; correct it, or skip such rows with --on-bad-row skip", rows('{"input_ids": [5, 6, 0, 0]}', '{"input_ids": [5, 6, 7, 8]}')),
        Case('ids that are lists', f'{SCORE} --id-column id', "rows.jsonl:1: row 0: column 'id' holds a list of number, not a string or a number; correct it, or skip such rows with --on-bad-row skip", rows('{"text": "w5 w6", "id": [1]}')),
        Case('a number of 5,000 digits', SCORE, 'rows.jsonl:2: row 1: JSON with a number of more than 4,300 digits; correct it, or skip such rows with --on-bad-row skip', rows('{"text": "w5 w6", "n": 1}', '{"text": "w5 w6", "n": ' + '9' * 5000 + '}')),
        Case('an id column that is not unique', f'{SCORE} --id-column id', "rows.jsonl:2: row 1: the id 'a' in column 'id' was there before; choose an --id-column whose values are unique", rows('{"text": "w5 w6", "id": "a"}', '{"text": "w5 w6", "id": "a"}')),
        Case('all rows too short', SCORE, 'rows.jsonl: nothing is left to score: of 1 rows 1 have fewer than two tokens, 0 are too long, 0 are bad; check the column and the limits', rows('{"text": ""}')),
    ],
    "Chats": [
        Case('the tokenizer has no template', SCORE, 'the tokenizer has no chat template; give --chat-template FILE, or --chat-template chatml', chat(USER, BOT)),
        Case('no message of the assistant', CHATML, 'rows.jsonl:1: row 0: no assistant turn to train on (roles: user); correct it, or skip such rows with --on-bad-row skip', chat(USER)),
        Case('messages are a text', CHATML, "rows.jsonl:1: row 0: column 'messages' holds a string, not a list of messages; correct it, or skip such rows with --on-bad-row skip", rows('{"messages": "w5"}')),
        Case('messages are empty', CHATML, "rows.jsonl:1: row 0: column 'messages' holds no message; correct it, or skip such rows with --on-bad-row skip", chat()),
        Case('a message without a role', CHATML, "rows.jsonl:1: row 0: column 'messages': message 0 has no role; correct it, or skip such rows with --on-bad-row skip", chat({'content': 'w5'}, BOT)),
        Case('a picture', CHATML, "rows.jsonl:1: row 0: column 'messages': message 0 has content whose part 0 is of type 'image': only text can be scored; correct it, or skip such rows with --on-bad-row skip", chat({'role': 'user', 'content': [{'type': 'image'}]}, BOT)),
        Case('content is a number', CHATML, "rows.jsonl:1: row 0: column 'messages': message 0 has content that is a number, not text; correct it, or skip such rows with --on-bad-row skip", chat({'role': 'user', 'content': 5}, BOT)),
        Case('a weight that is neither 0 nor 1', CHATML, "rows.jsonl:1: row 0: column 'messages': message 1 has weight 0.5; give 0 or 1: a loss mask knows nothing between them; correct it, or skip such rows with --on-bad-row skip", chat(USER, {**BOT, 'weight': 0.5})),
        Case('tools for a template without', CHATML, 'rows.jsonl:1: row 0: the chat template cannot render it: TemplateError: the template chatml has no place for tools; correct it, or skip such rows with --on-bad-row skip', chat(USER, BOT, tools=[{'type': 'function', 'function': {'name': 'f'}}])),
        Case('tools that are no JSON', CHATML, "rows.jsonl:1: row 0: column 'tools' is not JSON that can be read: Expecting value: line 1 column 2 (char 1); correct it, or skip such rows with --on-bad-row skip", chat(USER, BOT, tools='[')),
        Case('a template with a mistake', f'{SCORE} --chat-template t.jinja', "t.jinja: line 1: Expected an expression, got 'end of statement block'; fix the template", all_of(put('t.jinja', '{% for %}'), chat(USER, BOT))),
        Case('a template that is empty', f'{SCORE} --chat-template t.jinja', 't.jinja: the chat template is empty; check --chat-template', all_of(put('t.jinja', ' \n'), chat(USER, BOT))),
        Case('a template that repeats without end', f'{SCORE} --chat-template t.jinja', 'rows.jsonl:1: row 0: the chat template has a number over 1,000,000, which may take forever; correct it, or skip such rows with --on-bad-row skip', all_of(put('t.jinja', "{{ 'x' * 10000000000 }}"), chat(USER, BOT))),
        Case('a template that computes a power', f'{SCORE} --chat-template t.jinja', 'rows.jsonl:1: row 0: the chat template raises a number to a power, which may take forever; correct it, or skip such rows with --on-bad-row skip', all_of(put('t.jinja', '{{ 9 ** 99 }}'), chat(USER, BOT))),
        Case('a template that reaches for Python', f'{SCORE} --chat-template t.jinja', "rows.jsonl:1: row 0: the chat template cannot render it: SecurityError: access to attribute '__class__' of 'str' object is unsafe.; correct it, or skip such rows with --on-bad-row skip", all_of(put('t.jinja', "{{ ''.__class__.__mro__ }}"), chat(USER, BOT))),
    ],
    "Models and tokenizers": [
        Case('', SCORE.replace('--model model', '--model absent/model/dir'), 'absent/model/dir: no such directory; give a model directory or a Hub id'),
        Case('', SCORE.replace('--model model', "--model ''"), "the model's name is empty; give a model directory or a Hub id"),
        Case('no weights', SCORE, 'model: the directory has no weights; it needs *.safetensors files', remove('model/model.safetensors')),
        Case('weights that are pickles', SCORE, 'model: its weights are pickles, which can run code when loaded; convert them to safetensors, or add --allow-pickle', with_pickles),
        Case('weights that are a folder', SCORE, 'model: the directory has no weights; it needs *.safetensors files', all_of(remove('model/model.safetensors'), lambda: os.mkdir('model/model.safetensors'))),
        Case('a model without attention heads', SCORE, 'model: cannot load the model, its files are not as they should be: ZeroDivisionError…', config(num_attention_heads=0)),
        Case('weights cut short', SCORE, 'model: cannot load the model: Error while deserializing header: incomplete metadata, file not fully covered; a file of weights is damaged: fetch it again', halved('model/model.safetensors')),
        Case('weights of another shape', SCORE, "model: its weight lm_head.weight is [61, 32], its configuration makes it [64, 32]; correct the model's config.json", config(vocab_size=64)),
        Case('no config.json', SCORE, 'model: the directory has no config.json, so it is no model; give a directory made by save_pretrained, or a Hub id', remove('model/config.json')),
        Case('config.json is no JSON', SCORE, 'model: cannot load the model: Expecting property name enclosed in double quotes: line 1 column 24 (char 23); fetch it again, or repair its JSON files', put('model/config.json', '{"model_type": "llama",')),
        Case('a kind of model that is not known', SCORE, 'model: cannot load the model: The checkpoint you are trying to load has model type `unheard_of` but …; check the name and the revision', config(model_type='unheard_of', architectures=None)),
        Case('a number that no model has', SCORE, 'model: its config.json has num_hidden_layers 1,000,000,000, which no model has (at most 10,000); fetch the model again, or correct the file', config(num_hidden_layers=10 ** 9)),
        Case('a model with code of its own', SCORE, "model: cannot load the model: The repository model contains custom code …; read its code, then add --trust-remote-code", all_of(model_code, config(model_type='unheard_of'))),
        Case('a thousand million labels', SCORE, 'model: its config.json has num_labels 1,000,000,000, which no model has (at most 1,048,576); fetch the model again, or correct the file', config(num_labels=10**9)),
        Case('an adapter', SCORE, 'model: it holds an adapter (adapter_config.json), which may be loaded with another base model or not at all; merge the adapter into the weights, or move its files elsewhere', put('model/adapter_config.json', '{}')),
        Case('a pad token out of the vocabulary', SCORE, 'model: cannot load the model, its files are not as they should be: AssertionError: Padding_idx must be within num_embeddings; fetch it again, or repair its JSON files', config(pad_token_id=999)),
        Case('a model without its head', SCORE, 'model: its weights lack lm_head.weight; give a complete causal language model; a bare body has no head to predict with', as_another('body')),
        Case('an encoder and a decoder', SCORE, 'model: t5 is not a causal language model; the reference model must predict the next token (AutoModelForCausalLM or AutoModelForImageTextToText)', as_another('t5')),
        Case('a model that looks ahead', SCORE, 'model: what it predicts depends on what comes after (the entropy changes by …); the reference model must look only back, as decoders do', as_another('bert')),
        Case('no tokenizer', SCORE, 'model: the directory has no tokenizer files; name one with --tokenizer', all_of(remove('model/tokenizer.json'), remove('model/tokenizer_config.json'))),
        Case('a tokenizer.json cut short', SCORE, 'model: cannot load the tokenizer: Expecting value: line 64 column 14 (char 1115); fetch it again, or repair its JSON files', halved('model/tokenizer.json')),
        Case('a tokenizer with code of its own', SCORE, 'model: cannot load the tokenizer: The repository model contains custom code …; read its code, then add --trust-remote-code', tokenizer_code),
        Case('a tokenizer with other ids', f'{SCORE} --tokenizer tokenizer', "id 4 is 'w5' to the tokenizer you train with and 'w4' to the reference model; score with a model that has the same tokenizer, or check --tokenizer", other_tokenizer),
        Case('no such GPU', f'{SCORE} --device mps', '--device mps: torch … sees none here; use one of: …'),
    ],
    "Output directories": [
        Case('', SCORE.replace('--out out', '--out s3://bucket/out'), 's3://bucket/out: the output cannot be a URL; write to a local or shared disk, and copy or push the finished directory'),
        Case('', SCORE.replace('--out out', "--out ''"), "the directory's name is empty; give a directory"),
        Case('`out` is a file', SCORE, 'out: this is a file, not a directory; choose another --out', put('out', 'mine')),
        Case('`out` lies below a file', SCORE.replace('--out out', '--out rows.jsonl/out'), 'rows.jsonl/out: cannot write here: File exists; choose another --out'),
        Case('a name of 300 letters', SCORE.replace('--out out', f"--out {'x' * 300}"), '…: cannot write here: File name too long; choose another --out'),
        Case('`out` was scored with other settings', SCORE.replace('--out out', '--out scored'), 'scored: it was made with other settings: append_eos was null, now true; …'),
        Case('`out` is of another recipe', f'{MASK} --quantile 0.3'.replace('--out out', '--out masked'), 'masked: it was made with other settings: quantile was 0.5, now 0.3; use the settings it was made with, another --out, or --overwrite'),
        Case('`out` is a scored directory', MASK.replace('--out out', '--out scored'), 'scored: the masked dataset cannot be inside the scored one; choose another --out'),
        Case('a file of yours has the name of a shard', MASK, 'out: the directory holds something else (epoch_000); choose an empty or a new directory for --out', all_of(lambda: os.makedirs('out/epoch_000'), put('out/epoch_000/train-00000-of-00001.parquet', 'mine'))),
        Case('a link has the name of a folder', MASK, 'out: the directory holds something else (epoch_000); choose an empty or a new directory for --out', lambda: (os.mkdir('out'), os.symlink('../masked', 'out/epoch_000'))),
    ],
    "Settings of materialize": [
        Case('', f'{MASK} --quantile 1.5', "--quantile '1.5': input should be less than or equal to 1; see --quantile in --help"),
        Case('', f'{MASK} --quantile nan', "--quantile 'nan': input should be a finite number; see --quantile in --help"),
        Case('', f'{MASK} --rates 0.1', '--rates gives 1 rates for 2 epochs; give one rate for each epoch of the horizon'),
        Case('', f'{MASK} --rates 0.1,x', "--rates '0.1,x': input should be a valid number, unable to parse string as a number; see --rates in --help"),
        Case('', f'{MASK} --rates 0.1,1.2', '--rates holds 1.2; a rate lies between 0 and 1'),
        Case('', f'{MASK} --threshold 1 --quantile 0.5', '--quantile and --threshold exclude each other; give one of them'),
        Case('', f'{MASK} --max-rate 0.1 --min-rate 0.5', '--min-rate 0.5 is above --max-rate 0.1; swap them'),
        Case('', f'{MASK} --drop-token 2 --target inputs', "--drop-token '2' is the pad token: the model would learn to see ends everywhere; use random, or another token"),
        Case('', f'{MASK} --drop-token 99999 --target inputs', "--drop-token '99999': no token has the id 99999; ids go from 0 to 421"),
        Case('', f'{MASK} --protect absent', "--protect 'absent' is not understood; give special, none, or token ids separated by commas"),
        Case('', f'{MASK} --only-epochs 1-', "--only-epochs '1-' is not understood; write it as 2 or 2-5"),
        Case('', f'{MASK} --rows-per-shard 99999999999999999999', "--rows-per-shard '99999999999999999999': input should be less than or equal to 9223372036854775807; see --rows-per-shard in --help"),
        Case('a number of 5,000 digits', f'{MASK} --drop-token {"1" * 5000} --target inputs', "--drop-token '1…1' is … tokens; give an id, or text that is one token"),
        Case('', f'{MASK} --only-epochs 5', '--only-epochs 5 is not inside epochs 0 to 1; epochs count from 0'),
        Case('', f'{MASK} --scope column:absent', 'scored: --scope column:absent: there is no such column; score with --keep-columns: none was kept'),
        Case('', f'{MASK} --add-columns absent', "--add-columns 'absent': input should be 'n_trainable', 'position_ids' or 'seq_lengths'; see --add-columns in --help"),
        Case('', f'{MASK} --pack 1', "--pack '1': input should be greater than or equal to 2; see --pack in --help"),
        Case('two sources without names', f"{MASK.replace('scored', 'scored scored', 1)}", "'scored' has no name; write NAME=SCORED or NAME=SCORED:WEIGHT; a name is letters, digits, _ and -, 64 at most"),
        Case('a weight below 0', MASK.replace('scored', 'a=scored:-1', 1), "scored:-1: the weight '-1' is not a number such as 2 or 0.5; write NAME=SCORED:2"),
        Case('no such recipe', f'{MASK} --recipe absent.yaml', 'absent.yaml: cannot read the recipe: No such file or directory; check the path'),
        Case('a recipe that is no YAML', f'{MASK} --recipe r.yaml', 'r.yaml: the recipe is neither YAML nor JSON: while parsing a flow sequence in "<unicode string>", line 1, column 4: a: [1 ^ expected \',\' or \']\', but got \'<stream end>\' in "<unicode string>", line 1, column 6: a: [1 ^; correct the file', put('r.yaml', 'a: [1')),
        Case('a recipe that is a list', f'{MASK} --recipe r.yaml', 'r.yaml: the recipe is not a table of settings; write lines such as `quantile: 0.5`', put('r.yaml', '- 1')),
        Case('a setting that is not known', f'{MASK} --recipe r.yaml', "r.yaml: unknown setting 'quantil'; did you mean quantile?", put('r.yaml', 'quantil: 0.5')),
        Case('a setting that is there twice', f'{MASK} --recipe r.yaml', 'r.yaml: it sets max_rate twice; leave one of the two', put('r.yaml', 'max_rate: 0.5\nmax-rate: 0.9')),
        Case('a number that YAML counts by 8', f'{MASK} --recipe r.yaml', 'r.yaml: seed is 010, which YAML reads as 8; write it as a plain decimal number', put('r.yaml', 'seed: 010')),
        Case('a value that cannot be', f'{MASK} --recipe r.yaml', "--quantile 'high': input should be a valid number, unable to parse string as a number; see --quantile in --help", put('r.yaml', 'quantile: high')),
        Case('an alias that holds itself', f'{MASK} --recipe r.yaml', 'r.yaml: the recipe is neither YAML nor JSON: it is nested more than 500 deep; correct the file', put('r.yaml', 'rates: &a [*a]')),
        Case('aliases that grow without end', f'{MASK} --recipe r.yaml', 'r.yaml: the recipe is neither YAML nor JSON: it has more than 1,000,000 values or 67,108,864 characters, written out; correct the file', put('r.yaml', 'a: &a [x, x]\n' + ''.join((f'{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n' for a, b in zip('abcdefgh', 'bcdefghi', strict=True))))),
    ],
    "Finished directories": [
        Case('', 'verify absent', 'absent: no such directory; give a scored or a masked directory'),
        Case('', 'verify model', 'model: it is a model directory, not a scored or a masked directory; make one with `entrodrop score model --model MODEL --out SCORED`'),
        Case('', 'verify rows.jsonl', 'rows.jsonl: it is a file, not a scored or a masked directory; make one with `entrodrop score rows.jsonl --model MODEL --out SCORED`'),
        Case('an empty directory', 'verify out', 'out: it is an empty directory, not a scored or a masked directory; make one with `entrodrop score out --model MODEL --out SCORED`', lambda: os.mkdir('out')),
        Case('', 'materialize absent --out out --epochs 2', 'absent: no such directory; give a scored directory'),
        Case('', 'materialize masked --out out --epochs 2', 'masked: it is a masked directory; give the scored directory that it was made from'),
        Case('', 'materialize model --out out --epochs 2', 'model: it is a model directory, not a scored directory; make one with `entrodrop score model --model MODEL --out SCORED`'),
        Case('a shard is missing', MASK, 'scored/shard-00001.parquet: the file is missing; run the command that made it again', remove('scored/shard-00001.parquet')),
        Case('a byte of a shard was changed', MASK, 'scored/shard-00001.parquet: its bytes are not those the manifest was written for; remove it and run the command that made it again, or restore it', flipped('scored/shard-00001.parquet', 200)),
        Case('a byte of a shard was changed', 'verify scored', 'scored/shard-00001.parquet: its bytes are not those the manifest was written for; remove it and run the command that made it again, or restore it', flipped('scored/shard-00001.parquet', 200)),
        Case('a byte of the tokenizer was changed', 'verify scored', 'scored/tokenizer/tokenizer.json: its bytes are not those the manifest was written for; remove it and run the command that made it again, or restore it', flipped('scored/tokenizer/tokenizer.json', 200)),
        Case('a file that is not listed', 'verify scored', 'scored/shard-00009.parquet: the manifest does not list this file; remove it', lambda: shutil.copy('scored/shard-00001.parquet', 'scored/shard-00009.parquet')),
        Case('no manifest', 'verify masked', 'masked: the masked directory is not finished; run the same `entrodrop materialize` command again to finish it', remove('masked/manifest.json')),
        Case('a manifest that was edited', 'verify masked', 'masked/manifest.json: the manifest is damaged: Expecting value: line 28 column 6 (char 300); restore it, or make the directory again', flipped('masked/manifest.json', 300)),
        Case('a pipe in the place of a manifest', 'verify masked', 'masked/manifest.json: it is a named pipe, not a file; remove it and run the command that made it again', lambda: (os.unlink('masked/manifest.json'), os.mkfifo('masked/manifest.json'))),
        Case('a manifest that is no JSON', 'verify masked', 'masked/manifest.json: the manifest is damaged: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); restore it, or make the directory again', put('masked/manifest.json', '{')),
        Case('a manifest that names a file outside', 'verify scored', "scored/manifest.json: the manifest cannot be right: files[0].file: is no name of a file that this program writes there, not '../rows.jsonl'; restore it, or make the directory again", said('scored', files=[{'file': '../rows.jsonl', 'sha256': '0' * 64, 'bytes': 1}])),
        Case('a manifest with a number that cannot be', 'verify scored', 'scored/manifest.json: the manifest cannot be right: counts.rows: input should be greater than or equal to 0, not -1; restore it, or make the directory again', said('scored', counts={'rows': -1})),
        Case('a directory of a later version', 'verify scored', "scored: it holds 'scored/9', this needs 'scored/1'; give a scored directory made by this version", said('scored', schema='scored/9')),
        Case('an epoch is missing', 'verify masked', 'masked/epoch_001/train-00000-of-00001.parquet: the file is missing; run the command that made it again', remove('masked/epoch_001')),
        Case('a link in the place of a file', 'verify scored', 'scored/unigram.npy: it is a symbolic link, which may lead out of the directory; put the file in its place', lambda: (shutil.move('scored/unigram.npy', 'u'), os.symlink('../u', 'scored/unigram.npy'))),
        Case('', 'verify scored --against scored', 'scored: a scored directory has no masks to check; leave out --against'),
        Case('scores of other rows', 'verify masked --against other', "masked: it was not made from other: the scores' content digests differ", lambda: other_scores()),
        Case('', 'verify masked --against absent', 'absent: no such directory; give a scored directory'),
        Case('', 'inspect absent', 'absent: no such directory; give a scored or a masked directory'),
        Case('', 'inspect scored --row 9223372036854775808', '--row 9223372036854775808: no such row, or it was left out; the source has rows 0 to 23'),
        Case('', 'inspect scored --row 999', '--row 999: no such row, or it was left out; the source has rows 0 to 23'),
        Case('', 'report absent', 'absent: no such directory; give a scored or a masked directory'),
        Case('', 'report masked', 'masked: a masked directory holds no scores; name what it was made from: --against SCORED, or --against NAME=SCORED for each source'),
        Case('', 'report scored --recipe absent.yaml', 'absent.yaml: cannot read the recipe: No such file or directory; check --recipe'),
        Case('', 'recipe trl scored', 'scored: it is a scored directory; give the masked directory that `entrodrop materialize scored` writes'),
        Case('', 'recipe trl absent', 'absent: no such directory; give a masked directory'),
    ],
    "push and serve": [
        Case('', 'push absent alice/data', 'absent: no such directory; give a scored or a masked directory'),
        Case('', 'push masked data/data/data', "'data/data/data' is no name of a repository; write it USER/NAME, of letters, digits, `-`, `_` and `.`"),
        Case('a directory that is not finished', 'push masked alice/data', 'masked: the masked directory is not finished; run the same `entrodrop materialize` command again to finish it', remove('masked/manifest.json')),
        Case('a byte was changed', 'push masked alice/data', 'masked/epoch_000/train-00000-of-00001.parquet: its bytes are not those the manifest was written for; remove it and run the command that made it again, or restore it', flipped('masked/epoch_000/train-00000-of-00001.parquet', 90)),
        Case('', 'push masked alice/data --include-scored absent', 'absent: no such directory; give a scored directory'),
        Case('', 'push masked alice/data --recipe absent.yaml', 'absent.yaml: cannot read the recipe: No such file or directory; check --recipe'),
        Case('', 'serve absent/model/dir', 'absent/model/dir: no such directory; give a model directory or a Hub id'),
        Case('', 'serve model --port 99999', "--port '99999': input should be less than or equal to 65535; see --port in --help"),
    ],
}
# fmt: on


def other_scores() -> None:
    """A scored directory of other rows."""
    from helpers.scored import some_rows, write_scored

    write_scored(Path("other"), some_rows(24, lengths=(2, 20), seed=5))
