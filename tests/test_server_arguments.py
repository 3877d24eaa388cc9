"""server_arguments: what the user gave is read as SGLang's parser will read it."""

from __future__ import annotations

from pathlib import Path

from sglang_multipole.server_arguments import read_given


def test_all_forms_of_a_flag_are_read() -> None:
    argv = [
        "some/model",
        "--port=1",
        "--port",
        "2",
        "--sleep-on-idle",
        "--multipole-config={'a':1}",
    ]
    assert read_given(argv) == {
        "model_path": "some/model",
        "port": "2",
        "sleep_on_idle": "",
        "multipole_config": "{'a':1}",
    }


def test_a_value_after_a_switch_is_not_taken_for_the_model() -> None:
    assert "model_path" not in read_given(["--nccl-port", "5", "--cuda-graph-bs-decode", "1", "2"])


def test_the_command_line_overrides_the_configuration_file(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("port: 7\ndecode-attention-backend: triton\n")
    given = read_given(["--config", str(config), "--port", "8"])
    assert given == {"config": str(config), "port": "8", "decode_attention_backend": "triton"}


def test_a_broken_configuration_file_is_left_to_sglang(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("[")
    assert read_given(["--config", str(config)]) == {"config": str(config)}
    assert read_given(["--config", "absent.yaml"]) == {"config": "absent.yaml"}
