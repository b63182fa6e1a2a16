"""The command line: what cannot work is said in one line, at once, with a non-zero exit status."""

import socket
from pathlib import Path

import pytest

from serving.model_server import config, flags
from serving.model_server.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model_base_path=/m", "--prot=8500"], "unknown argument: --prot=8500"),
        (["--model_base_path=/m", "extra"], "unknown argument: extra"),
        ([], "--model_base_path"),
        (["--model_base_path="], "--model_base_path"),
        (["--model_base_path=gs://bucket/m"], "not local"),
        (["--model_base_path", __file__], "is a file"),
        (["--model_base_path=/m", "--port=many"], "--port"),
        (["--model_base_path=/m", "--port=70000"], "70000"),
        (["--model_base_path=/m", "--port=0"], "nothing to listen on"),
        (["--model_base_path=/m", "--port=9000", "--rest_api_port=9000"], "9000"),
        (["--model_base_path=/m", "--ssl_config_file=tls.txt"], "TLS"),
        (["--model_base_path=/m", "--enable_batching"], "batching"),
        (["--model_config_file=/does/not/exist"], "/does/not/exist"),
    ],
)
def test_an_unusable_command_line_ends_with_one_line_and_a_nonzero_status(run_command, arguments, says):
    """Start scripts and people read the last line; there is no usage text around it and no traceback."""
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_in_use_ends_with_one_line_before_tensorflow_is_loaded(run_command, tmp_path, free_port, flag):
    """The operator sees which port of which flag is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "rest_api_port" if flag == "port" else "port"
        result = run_command(f"--model_base_path={tmp_path}", f"--{flag}={port}", f"--{other}={free_port()}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f":{port} (--{flag}): Address already in use" in result.stderr


def test_help_and_version_are_answered(run_command):
    """Both are instant, since neither needs it."""
    shown = run_command("--version")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[0].startswith("TensorFlow ModelServer")
    assert shown.stdout.splitlines()[1].startswith("TensorFlow Library: 2.")
    help_text = run_command("--help").stdout
    assert "--model_base_path" in help_text


def test_both_spellings_of_a_flag_are_read():
    """``--flag=value`` and ``--flag value``, and a bare boolean, as in the original."""
    settings = flags.parse(
        [
            *("--port", "9000", "--rest_api_port=9001", "--model_base_path", "/m", "--model_name=digits"),
            *("--enable_model_warmup=false", "--rest_api_enable_cors_support", "--file_system_poll_wait_seconds=0.25"),
        ]
    )
    assert (settings.port, settings.rest_api_port, settings.model_name) == (9000, 9001, "digits")
    assert settings.enable_model_warmup is False
    assert settings.rest_api_enable_cors_support is True
    assert settings.file_system_poll_wait_seconds == 0.25


def test_flags_that_have_no_effect_here_are_accepted():
    """A start script of the original runs unchanged."""
    flags.parse(["--model_base_path=/m", "--flush_filesystem_caches=true", "--rest_api_num_threads", "16"])


def test_a_config_file_gives_models_policies_and_labels(tmp_path):
    """The text format of ModelServerConfig."""
    file = tmp_path / "models.config"
    file.write_text(
        'model_config_list { config { name: "a" base_path: "/m/a" model_platform: "tensorflow" '
        'model_version_policy { specific { versions: 2 versions: 5 } } version_labels { key: "stable" value: 2 } } '
        'config { name: "b" base_path: "/m/b" model_version_policy { latest { num_versions: 2 } } } '
        'config { name: "c" base_path: "/m/c" model_version_policy { all {} } } '
        'config { name: "d" base_path: "/m/d" } }'
    )
    a, b, c, d = config.read_file(file)
    assert (a.name, a.base_path, dict(a.labels)) == ("a", Path("/m/a"), {"stable": 2})
    assert a.policy == config.Specific(frozenset({2, 5}))
    assert b.policy == config.Latest(2)
    assert c.policy == config.All()
    assert d.policy == config.Latest(1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_config_list { config { nmae: 1 } }", "no text ModelServerConfig"),
        ('model_config_list { config { name: "a" } }', "no base path"),
        ('model_config_list { config { base_path: "/m" } }', "no name"),
        ('model_config_list { config { name: "a" base_path: "/m" } config { name: "a" base_path: "/n" } }', "twice"),
        ('model_config_list { config { name: "a" base_path: "/m" model_platform: "caffe" } }', "caffe"),
    ],
)
def test_a_wrong_config_file_names_what_is_wrong(tmp_path, text, says):
    """The message says which model, and what was expected."""
    file = tmp_path / "models.config"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        config.read_file(file)
