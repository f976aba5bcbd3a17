import pytest

from alignkit.data import read_prompts


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_of_text_is_a_prompt(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "\ufeffa cat\n\n  a dog \n"))
    assert prompts.prompts == ["a cat", "a dog"] and prompts.columns == {}


def test_other_keys_of_jsonl_are_columns(tmp_path):
    prompts = read_prompts(
        write(tmp_path, "p.jsonl", '{"prompt": "two cats", "count": 2}\n{"count": null, "prompt": "a"}')
    )
    assert (prompts.prompts, prompts.columns, len(prompts)) == (["two cats", "a"], {"count": [2, None]}, 2)
    rows = prompts.rows([1, 0, 1])
    assert (rows.prompts, rows.columns) == (["a", "two cats", "a"], {"count": [None, 2, None]})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "is empty"),
        ("p.csv", "a cat", "ends in .txt or .jsonl"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3: not JSON"),
        ("p.jsonl", '["a cat"]', "line 1: expected an object"),
        ("p.jsonl", '{"text": "a cat"}', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "count": 1}', r"line 2: expected the keys of the first line"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_a_missing_file_says_from_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="seen from"):
        read_prompts(tmp_path / "missing.txt")
