"""Flags from the environment: for those that are not given."""

import pytest

from model.script_parser import ScriptParser


@pytest.fixture
def parser() -> ScriptParser:
    parser = ScriptParser("a script")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--max_steps", type=int, default=7)
    parser.add_argument("--schedule", choices=("linear", "cosine"))
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--resume", nargs="?", const=True, default=False)
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--add_model", action="append", default=[])
    parser.add_argument("--api_key")
    return parser


ENVIRONMENT = {
    "MAX_STEPS": ("20", "max_steps", 20),
    "SCHEDULE": ("cosine", "schedule", "cosine"),
    "DETERMINISTIC": ("true", "deterministic", True),
    "RESUME": ("true", "resume", "true"),
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


@pytest.mark.parametrize(
    ("name", "value"),
    (("MAX_STEPS", ""), ("DETERMINISTIC", "false"), ("NO_SUCH_FLAG", "1"), ("API_KEY", "secret")),
)
def test_what_leaves_a_script_as_it_is(
    name: str, value: str, parser: ScriptParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = vars(parser.parse_args([]))
    monkeypatch.setenv(f"MINIMIND_{name}", value)
    assert vars(parser.parse_args([])) == usual


@pytest.mark.parametrize(
    ("name", "value"), (("MAX_STEPS", "many"), ("SCHEDULE", "square"), ("DETERMINISTIC", "maybe"))
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
