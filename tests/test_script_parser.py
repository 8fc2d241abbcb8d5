"""Flags from the environment: for those that are not given."""

import pytest

from model.script_parser import ScriptParser


@pytest.fixture
def parser() -> ScriptParser:
    parser = ScriptParser("a script")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--max_steps", "--max_updates", type=int, default=7)
    parser.add_argument("--schedule", choices=("linear", "cosine"))
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--resume", nargs="?", const=True, default=False)
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--add_model", action="append", default=[])
    parser.add_argument("--lora", nargs="?", const="new")
    parser.add_argument("--api_key")
    parser.add_argument("--top_k", type=int)
    parser.set_defaults(top_k=16)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interactive", action="store_true")
    what.add_argument("--prompt", action="append")
    return parser


ENVIRONMENT = {
    "MAX_STEPS": ("20", "max_steps", 20),
    "MAX_UPDATES": ("20", "max_steps", 20),
    "SCHEDULE": ("cosine", "schedule", "cosine"),
    "DETERMINISTIC": ("true", "deterministic", True),
    "RESUME": ("true", "resume", True),
    "LORA": ("out/lora_512", "lora", "out/lora_512"),
    "INTERACTIVE": ("1", "interactive", True),
    "TOP_K": ("3", "top_k", 3),
    "INPUT": ("a.csv 'b c.csv'", "input", ["a.csv", "b c.csv"]),
    "ADD_MODEL": ("x=y", "add_model", ["x=y"]),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_variable_stands_for_its_flag(
    name: str, parser: ScriptParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, field, expected = ENVIRONMENT[name]
    monkeypatch.setenv(f"MINIMIND_{name}", value)
    assert getattr(parser.parse_args([]), field) == expected


def test_the_command_line_goes_first(parser: ScriptParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_MAX_STEPS", "20")
    monkeypatch.setenv("MINIMIND_INPUT", "a b")
    monkeypatch.setenv("MINIMIND_SCHEDULE", "cosine")
    args = parser.parse_args(["sft", "--max_steps", "3", "--schedule=linear"])
    assert args.schedule == "linear"
    assert (args.stage, args.max_steps, args.input) == ("sft", 3, ["a", "b"])
    assert parser.parse_args(["--max_st", "3"]).max_steps == 3, "abbreviated"
    assert parser.parse_args(["--", "sft"]).stage == "sft"
    monkeypatch.setenv("MINIMIND_LORA", "true")
    assert parser.parse_args([]).lora == "new"
    monkeypatch.setenv("MINIMIND_ADD_MODEL", "a")
    assert parser.parse_args(["--add_model", "b"]).add_model == ["b"]


def test_a_flag_that_is_given_switches_off_what_excludes_it(
    parser: ScriptParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMIND_INTERACTIVE", "true")
    args = parser.parse_args(["--prompt", "x"])
    assert (args.prompt, args.interactive) == (["x"], False)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("MAX_STEPS", ""),
        ("DETERMINISTIC", "false"),
        ("NO_SUCH_FLAG", "1"),
        ("API_KEY", "secret"),
        ("MAX_STEPS", "tcp://10.0.0.1:8000"),
    ),
)
def test_what_leaves_a_script_as_it_is(
    name: str, value: str, parser: ScriptParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = vars(parser.parse_args([]))
    monkeypatch.setenv(f"MINIMIND_{name}", value)
    assert vars(parser.parse_args([])) == usual


@pytest.mark.parametrize(
    ("name", "value"),
    (("MAX_STEPS", "many"), ("SCHEDULE", "square"), ("DETERMINISTIC", "maybe"), ("INPUT", "it's")),
)
def test_a_bad_value_is_checked_and_traced_to_the_environment(
    name: str,
    value: str,
    parser: ScriptParser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv(f"MINIMIND_{name}", value)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert value in message and f"set in the environment: MINIMIND_{name}" in message


def test_a_started_script_names_what_came_from_the_environment(
    parser: ScriptParser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.setenv("MINIMIND_MAX_STEPS", "20")
    parser.parse_args()
    assert capsys.readouterr().err == "from the environment: MINIMIND_MAX_STEPS\n"
