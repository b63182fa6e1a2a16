"""The command line: what cannot work is said in one line, at once, with a non-zero exit status."""

import re
import socket
from pathlib import Path

import pytest

from serving.model_server import config, flags
from serving.model_server.errors import UsageError
from tests.ports import free_port


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
        (["--model_base_path=/m", "--use_alts_credentials"], "ALTS"),
        (["--model_base_path=/m", "--ssl_config_file=/does/not/exist"], "--ssl_config_file /does/not/exist"),
        (["--model_config_file=/does/not/exist"], "/does/not/exist"),
        (["--model_base_path=/does/not/exist"], "base path /does/not/exist: expected a folder"),
    ],
)
def test_an_unusable_command_line_ends_with_one_line_and_a_nonzero_status(run_command, arguments, says):
    """Start scripts and people read the last line; there is no usage text around it and no traceback."""
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_configuration_file_may_name_a_folder_that_a_first_release_will_make(run_command, tmp_path):
    """But not one in a folder that is not there, which is a path misspelt or a volume not mounted."""
    file = tmp_path / "models.config"
    file.write_text(f'model_config_list {{ config {{ name: "a" base_path: "{tmp_path}/no/such" }} }}')
    result = run_command(f"--model_config_file={file}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"there is no {tmp_path}/no; check --model_config_file" in result.stderr
    file.write_text(f'model_config_list {{ config {{ name: "a" base_path: "{tmp_path}/yet" }} }}')
    settings = flags.parse([f"--model_config_file={file}"])
    config.require_folders(config.from_flags(settings), settings)


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_in_use_ends_with_one_line_before_tensorflow_is_loaded(run_command, tmp_path, flag):
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


@pytest.mark.parametrize(
    ("read", "flag", "text", "says"),
    [
        (config.read_batching, "batching_parameters_file", "max_batch_size: 3", "no text BatchingParameters"),
        (config.read_batching, "batching_parameters_file", "max_batch_size { value: 0 }", "max_batch_size is 0"),
        (
            config.read_batching,
            "batching_parameters_file",
            "max_batch_size { value: 8 } allowed_batch_sizes: [2, 4]",
            "ascending sizes were expected, the last of them 8",
        ),
        (config.read_tls, "ssl_config_file", "client_verify: true", "client_verify needs custom_ca"),
        (config.read_tls, "ssl_config_file", 'server_key: "x" server_cert: "y"', "must be PEM texts"),
        (config.read_metrics_path, "monitoring_config_file", "prometheus { }", "no text MonitoringConfig"),
        (
            config.read_metrics_path,
            "monitoring_config_file",
            'prometheus_config { enable: true path: "/v1/metrics" }',
            "/v1/metrics",
        ),
    ],
)
def test_a_wrong_parameters_file_names_what_is_wrong(tmp_path, read, flag, text, says):
    """Before a port is bound or TensorFlow is loaded."""
    file = tmp_path / "file"
    file.write_text(text)
    settings = flags.parse(["--model_base_path=/m", "--rest_api_port=1", "--enable_batching", f"--{flag}={file}"])
    with pytest.raises(UsageError, match=re.escape(says)):
        read(settings)


def test_batching_parameters_default_to_those_of_tensorflow_serving(tmp_path):
    """And a file changes what it names."""
    assert config.read_batching(flags.parse(["--model_base_path=/m"])) is None
    default = config.read_batching(flags.parse(["--model_base_path=/m", "--enable_batching"]))
    assert (default.max_batch_size, default.batch_timeout_s, default.max_enqueued_batches) == (1000, 0, 10)
    file = tmp_path / "batching"
    file.write_text(
        "max_batch_size { value: 64 } batch_timeout_micros { value: 5000 } num_batch_threads { value: 3 } "
        "max_enqueued_batches { value: 7 } allowed_batch_sizes: 8 allowed_batch_sizes: 16 "
        "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 16 }"
    )
    settings = flags.parse(["--model_base_path=/m", "--enable_batching", f"--batching_parameters_file={file}"])
    read = config.read_batching(settings)
    assert (read.max_batch_size, read.capacity, read.batch_timeout_s, read.num_batch_threads) == (64, 16, 0.005, 3)
    assert [read.padded(size) for size in (1, 8, 9, 16)] == [8, 8, 16, 16]


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
