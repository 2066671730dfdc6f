"""Which configuration a shape gets: forced, from a table, or by the heuristic."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading

import pytest
import torch

from fastmamba import configs, tuned
from fastmamba.configs import SsdConfig, override, ssd_config

CPU = torch.device("cpu")
SHAPE = tuned.Shape("bfloat16", 1, 16384, 80, 64, 128)
PLAIN = ssd_config(CPU, torch.bfloat16, 1, 16384, 80, 64, 128, None)


def entry(shape: tuned.Shape = SHAPE, us: float = 100.0, **config: object) -> dict:
    return {"shape": vars(shape), "config": vars(dataclasses.replace(PLAIN, **config)), "us": us}


def write(folder: pathlib.Path, *entries: object, device: str = "NVIDIA H200") -> pathlib.Path:
    path = folder / f"{tuned.slug(device)}.json"
    path.write_text(json.dumps({"device": device, "ssd": entries}))
    return path


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of tables, and nothing remembered."""
    monkeypatch.setenv("FASTMAMBA_TUNED", str(tmp_path))
    tuned.entries.cache_clear()
    configs._choose.cache_clear()
    yield tmp_path
    tuned.entries.cache_clear()
    configs._choose.cache_clear()


def test_the_nearest_entry_of_the_bucket():
    def made(config: int, us: float = 100.0, **shape: object) -> tuned.Entry[int]:
        return tuned.Entry(dataclasses.replace(SHAPE, **shape), config, us)

    table = (
        made(0, tokens=1024),
        made(1, tokens=16384),
        made(2, tokens=16384, us=90.0),
        made(3, tokens=16384, us=1.0, head_dim=128),
        made(4, tokens=16384, us=1.0, dtype="float32"),
        made(5, tokens=16384, batch=16),
        made(6, tokens=131072, heads=40),
    )

    def chosen(**shape: object) -> int | None:
        found = tuned.nearest(table, dataclasses.replace(SHAPE, **shape))
        return None if found is None else found.config

    assert chosen() == 2  # the faster of equally near ones
    assert chosen(tokens=20000) == 2
    assert chosen(tokens=2000) == 0
    assert chosen(tokens=256) == 0
    assert chosen(tokens=255) is None  # more than four times fewer
    assert chosen(tokens=2**18) == 6
    assert chosen(heads=16, batch=80) == 5  # rows and heads count together
    assert chosen(head_dim=128) == 3
    assert chosen(head_dim=100) == 3  # the same block as 128
    assert chosen(head_dim=65, state=127) == 3
    assert chosen(state=256) is None
    assert chosen(dtype="float32") == 4
    assert chosen(dtype="float16") is None
    near = tuned.nearest(table, SHAPE, lambda config: config != 2)
    assert near is not None and near.config == 1


def test_a_table_as_written_is_what_is_read(tmp_path):
    path = write(tmp_path, entry(us=253.1, chunk=32), entry(tuned.Shape("float16", 2, 5, 3, 64, 16), us=7))
    first, second = tuned.load(path, "ssd", SsdConfig)
    assert first == tuned.Entry(SHAPE, dataclasses.replace(PLAIN, chunk=32), 253.1)
    assert second.shape == tuned.Shape("float16", 2, 5, 3, 64, 16) and second.us == 7.0
    assert tuned.load(path, "another op", SsdConfig) == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: e.pop("us"), r"entry 1 of 'ssd': must have shape, config and us"),
        (lambda e: e.update(us=0), r"us must be a positive number of microseconds, got 0"),
        (lambda e: e.update(us="fast"), r"us must be a positive number .* got 'fast'"),
        (lambda e: e["config"].pop("chunk"), r"config: chunk is missing"),
        (lambda e: e["config"].update(chnk=64), r"config: chnk is unknown"),
        (lambda e: e["config"].update(chunk="64"), r"config: chunk must be a positive integer, got '64'"),
        (lambda e: e["config"].update(variant=3), r"config: variant must be a string, got 3"),
        (lambda e: e["config"].update(scores=1), r"config: scores must be true or false, got 1"),
        (lambda e: e["shape"].update(tokens=0), r"shape: tokens must be a positive integer, got 0"),
        (lambda e: e.update(shape=[1, 2]), r"shape: dtype is missing, batch is missing"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, spoil, message):
    bad = json.loads(json.dumps(entry()))
    spoil(bad)
    path = write(tmp_path, entry(), bad)
    with pytest.raises(ValueError, match=message) as raised:
        tuned.load(path, "ssd", SsdConfig)
    assert str(path) in str(raised.value) and "entry 1" in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"ssd": {}}', '"ssd"'])
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "nvidia_h200.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="nvidia_h200.json"):
        tuned.load(path, "ssd", SsdConfig)


def test_tables_that_ship_can_be_used():
    for path in (pathlib.Path(tuned.__file__).parent).glob("*.json"):
        table = json.loads(path.read_text())
        assert tuned.slug(table["device"]) == path.stem
        assert table["measured"].keys() >= {"date", "command", "versions"}
        assert tuned.load(path, "ssd", SsdConfig)


@pytest.fixture
def h200(monkeypatch):
    """A device that looks like an H200 to the lookup."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    configs.ssd_variants.cache_clear()
    monkeypatch.setattr(configs, "_limits", lambda device: configs._Limits(132, 227 * 1024, True))
    yield torch.device("cuda", 0)
    configs.ssd_variants.cache_clear()


def choose(device: torch.device, tokens: int = 16384, chunk_size: int | None = None) -> SsdConfig:
    return ssd_config(device, torch.bfloat16, 1, tokens, 80, 64, 128, chunk_size)


@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "state", "tokens", "expected"),
    # What was fastest of those timed on an H200, or up to 4% slower: chunk, segments, channels of a block, registers,
    # blocks that are dealt out.
    [
        (1, 80, 64, 128, 1024, (64, 1, 64, 255, 1)),  # a multiprocessor each, and short
        (1, 80, 64, 128, 4096, (32, 3, 64, 255, 1)),  # two blocks on each of 132 multiprocessors
        (1, 80, 64, 128, 16384, (32, 9, 64, 168, 1)),  # three
        (1, 80, 64, 128, 131072, (32, 19, 64, 168, 1)),
        (1, 128, 64, 128, 1024, (64, 1, 64, 255, 1)),
        (1, 128, 64, 128, 131072, (32, 3, 64, 168, 1)),
        (32, 80, 64, 128, 1024, (32, 1, 64, 168, 1)),  # nothing to gain from segments
        (1, 48, 64, 128, 16384, (32, 8, 64, 168, 1)),
        (1, 24, 64, 128, 4096, (32, 11, 64, 255, 1)),
        (1, 24, 64, 128, 1024, (32, 4, 64, 255, 1)),
        (1, 24, 64, 128, 16384, (32, 11, 64, 255, 1)),
        (1, 40, 128, 128, 16384, (32, 6, 128, 255, 264)),  # two blocks of 128 channels
        (1, 40, 128, 128, 65536, (32, 13, 128, 255, 264)),
        (1, 40, 192, 128, 65536, (32, 13, 64, 168, 1)),  # 128 do not divide them
        (1, 48, 64, 256, 16384, (32, 5, 64, 255, 264)),
        (1, 48, 64, 256, 65536, (32, 11, 64, 255, 264)),
        (1, 24, 128, 256, 16384, (32, 5, 128, 255, 132)),
        (1, 24, 128, 256, 65536, (32, 11, 128, 255, 132)),
        (1, 24, 128, 256, 4096, (32, 5, 128, 255, 132)),
        (1, 24, 128, 256, 2048, (32, 5, 128, 255, 1)),
        (2, 24, 128, 256, 16384, (32, 8, 128, 255, 66)),
    ],
)
def test_the_portable_kernel_fills_the_gpu(
    h200, batch: int, heads: int, head_dim: int, state: int, tokens: int, expected: tuple[int, ...]
) -> None:
    with override("portable"):
        config = ssd_config(h200, torch.bfloat16, batch, tokens, heads, head_dim, state, None)
    assert (config.chunk, config.segments, config.block_p, config.registers, config.blocks) == expected
    assert config.variant == "portable" and config.scores == (config.chunk == 32)


@pytest.mark.parametrize(
    ("limits", "state", "expected"),
    [  # chunk, channels of a block, warps, stages, registers
        (configs._Limits(108, 163 * 1024, False), 128, (32, 64, 4, 2, 255)),  # A100
        (configs._Limits(108, 163 * 1024, False), 256, (64, 64, 8, 2, 255)),
        (configs._Limits(84, 99 * 1024, False), 256, (64, 64, 8, 2, 255)),  # A10
        (configs._Limits(304, 64 * 1024, False), 256, (32, 64, 8, 1, 255)),  # MI300
        (configs._Limits(170, 99 * 1024, True), 128, (32, 64, 4, 4, 255)),  # RTX 5090: one block, not three
        (configs._Limits(170, 99 * 1024, True), 256, (32, 64, 4, 2, 255)),
    ],
)
def test_what_other_gpus_have_room_for(monkeypatch, limits, state: int, expected: tuple[int, ...]) -> None:
    monkeypatch.setattr(configs, "_limits", lambda device: limits)
    config = configs._portable(CPU, torch.bfloat16, 1, 16384, 24, 128, state, None)
    assert (config.chunk, config.block_p, config.warps, config.stages, config.registers) == expected


@pytest.mark.parametrize(
    ("heads", "head_dim", "state", "tokens", "segments", "slices"),
    [  # what was fastest on an H200
        (80, 64, 128, 1024, 1, 1),
        (80, 64, 128, 4096, 3, 2),
        (80, 64, 128, 16384, 3, 2),
        (48, 64, 128, 16384, 5, 2),
        (48, 64, 128, 131072, 5, 2),  # with leaders, as are 96 heads
        (24, 64, 128, 1024, 4, 1),
        (24, 64, 128, 4096, 5, 1),
        (24, 64, 128, 16384, 11, 2),
        (8, 64, 128, 16384, 16, 1),
        (40, 128, 128, 65536, 3, 2),
        (96, 64, 128, 16384, 2, 2),
        (128, 64, 128, 16384, 1, 1),
        (24, 128, 256, 1024, 4, 2),
        (24, 128, 256, 4096, 5, 2),
        (48, 64, 256, 16384, 5, 2),
        (48, 64, 256, 65536, 5, 2),
    ],
)
def test_the_hopper_kernel_fills_the_gpu(
    h200, heads: int, head_dim: int, state: int, tokens: int, segments: int, slices: int
) -> None:
    with override("hopper"):
        config = ssd_config(h200, torch.bfloat16, 1, tokens, heads, head_dim, state, None)
    assert (config.variant, config.segments, config.block_slices) == ("hopper", segments, slices)


@pytest.mark.parametrize("state", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_the_hopper_kernel_at_the_borders(h200, head_dim: int, state: int) -> None:
    for batch, tokens, heads, groups in (
        (1, 1, 1, 1),  # less than a chunk
        (3, 63, 6, 2),
        (1, 64, 5, 1),
        (1, 511, 3, 1),
        (1, 2**20, 1, 1),
        (1, 2**20, 128, 8),
        (4096, 1024, 128, 8),  # far more blocks than multiprocessors
    ):
        size = (batch, tokens, heads, head_dim, state)
        config = ssd_config(h200, torch.bfloat16, *size, None, groups=groups)
        assert (config.variant, config.chunk, config.block_n) == ("hopper", 64, state)
        assert 1 <= config.segments <= max(1, min(tokens // 64 // 4 + 1, 64))
        assert config.block_slices in ((2,) if state == 256 else (1, 2))
        assert config.block_p == 64 * config.block_slices
        assert config.stages == (2 if state == 256 else 3 if config.block_slices == 2 else 4)
        if tokens <= 7 * 64 or batch > 132:
            assert config.segments == 1
        assert ssd_config(h200, torch.bfloat16, *size, 64, groups=groups) == config  # as large as its own


@pytest.mark.parametrize(
    ("dtype", "head_dim", "state", "chunk_size", "regular"),
    [
        (torch.float32, 64, 128, None, True),
        (torch.bfloat16, 96, 128, None, True),
        (torch.bfloat16, 32, 128, None, True),
        (torch.bfloat16, 64, 32, None, True),
        (torch.bfloat16, 64, 200, None, True),
        (torch.bfloat16, 64, 512, None, True),
        (torch.bfloat16, 64, 256, 63, True),
        (torch.bfloat16, 64, 256, None, False),
    ],
)
def test_what_the_hopper_kernel_does_not_cover(
    tables, h200, dtype: torch.dtype, head_dim: int, state: int, chunk_size: int | None, regular: bool
) -> None:
    shape = tuned.Shape(str(dtype).removeprefix("torch."), 1, 4096, 80, head_dim, state)
    write(tables, entry(shape, variant="hopper"))  # found for other shapes of the same widths, too
    size = (1, 4096, 80, head_dim, state, chunk_size)
    assert ssd_config(h200, dtype, *size, regular=regular).variant == "portable"
    with override("hopper"), pytest.raises(ValueError, match="does not cover this call, which portable can serve"):
        ssd_config(h200, dtype, *size, regular=regular)


def test_a_chunk_size_bounds_the_portable_kernels(h200) -> None:
    with override("portable"):
        assert choose(h200, chunk_size=16).chunk == 16
        assert choose(h200, chunk_size=256).chunk == choose(h200).chunk


def test_a_table_comes_before_the_heuristic(tables, h200):
    heuristic = choose(h200)
    write(tables, entry(warps=2))
    assert choose(h200) == heuristic  # what was chosen once stays
    tuned.entries.cache_clear()
    configs._choose.cache_clear()
    assert choose(h200).warps == 2
    assert choose(h200, tokens=30000).warps == 2
    assert choose(h200, tokens=2**20) != dataclasses.replace(heuristic, warps=2)  # too far from what was measured
    assert choose(h200, chunk_size=64).warps == heuristic.warps  # a bound on the chunk asks for another optimum


def test_a_variant_that_cannot_run_is_not_taken_from_a_table(tables, h200):
    write(tables, entry(variant="of another chip", warps=2, us=1.0), entry(warps=1, us=2.0))
    assert choose(h200).warps == 1


def test_a_bad_table_is_a_warning_and_the_heuristic(tables, h200):
    heuristic = choose(h200)
    tuned.entries.cache_clear()
    configs._choose.cache_clear()
    path = write(tables, {"shape": {}, "config": {}, "us": 1})
    with pytest.warns(RuntimeWarning, match=f"{path}, entry 0 of 'ssd': shape: dtype is missing"):
        assert choose(h200) == heuristic


def test_override_reaches_this_thread_alone():
    forced = dataclasses.replace(PLAIN, chunk=16)
    seen = []
    with override(forced):
        assert choose(CPU) is forced
        thread = threading.Thread(target=lambda: seen.append(choose(CPU)))
        thread.start()
        thread.join()
        with override("portable"):
            assert choose(CPU) == PLAIN
        assert choose(CPU) is forced
    assert choose(CPU) == PLAIN and seen == [PLAIN]
    with override("imagined"), pytest.raises(ValueError, match="variant 'imagined' .* cpu, which has portable"):
        choose(CPU)
