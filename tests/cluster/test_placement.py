"""Where trials go: the smallest class that fits, and by name those that fit nowhere."""

import dataclasses
import re

import pytest

from cluster.capacity import seconds
from cluster.effort import Effort
from cluster.machines import Cluster, Node, as_told, uniform
from cluster.pace import Pace
from cluster.placement import PROCESS_BYTES, SHARE_GAIN, Placement, Unplaceable, place
from cluster.room import Room
from trainers.flops import params
from trainers.gpus import gpu_type
from trainers.memory import (
    CONTEXT_BYTES,
    HEADROOM,
    NCCL_BYTES,
    fitting_passes,
    training_memory,
)
from trainers.shape import Shape
from trainers.trial import Trial

H100S = uniform(nodes=8, gpus=8, gpu_type="H100")


@pytest.fixture
def large(make_trial):
    """A pretraining trial of a width, 64 units a block and 64 units a head, by AdamW."""

    def make(width: int, *, sequences: int = 256, context: int = 1024) -> Trial:
        trial = make_trial(32, 1e10)
        shape = Shape(
            width=width, depth=width // 64, heads=width // 64, vocabulary=256, context=context
        )
        h = dataclasses.replace(
            trial.hyperparameters, batch_tokens=sequences * context, optimizer="adamw"
        )
        return dataclasses.replace(trial, shape=shape, hyperparameters=h)

    return make


def _placed(trial: Trial, cluster: Cluster) -> Placement:
    found = place(trial, cluster)
    assert isinstance(found, Placement), str(found)
    return found


def _simulated(trial: Trial, **settings: float) -> Trial:
    return dataclasses.replace(trial, trainer="simulated", settings=tuple(sorted(settings.items())))


@pytest.mark.parametrize(
    ("width", "label"),
    [
        (64, "1/4 GPU"),  # computes for less time than its launches take
        (512, "1 GPU"),
        (1600, "1 GPU"),  # 0.77e9 parameters x 20 bytes = 15 GB, and 45 GB of activations
        (1856, "2 GPUs"),  # 1.2e9 x 20 = 24 GB, and 57
    ],
)
def test_the_class_grows_with_the_model(large, width: int, label: str) -> None:
    found = _placed(large(width), H100S)
    assert found.label == label
    assert found.bytes <= (1 - HEADROOM) * 80e9 * min(1, found.gpus)


def test_a_larger_model_never_takes_fewer_gpus(large) -> None:
    gpus = [_placed(large(width), H100S).gpus for width in range(64, 2432, 64)]
    assert gpus == sorted(gpus)


@pytest.fixture
def busy(large):
    """A trial of one block of 64 units, so long that compiling it takes no time beside the rest.

    By the number of sequences of 64 tokens in its steps, which keep an H100 busy for 4% of each.
    """

    def make(sequences: int) -> Trial:
        trial = large(64, sequences=sequences, context=64)
        h = dataclasses.replace(trial.hyperparameters, steps=100_000_000)
        return dataclasses.replace(trial, hyperparameters=h)

    return make


def test_a_share_is_for_models_that_cannot_fill_a_gpu(busy) -> None:
    gpu = H100S.nodes[0].gpu
    for sequences, low, high, gpus in ((1, 0.03, 0.05, 1 / 8), (5, 1 / 8, 1 / 4, 1 / 4)):
        trial = busy(sequences)
        assert low < Effort.of(trial).busy(gpu) < high
        assert _placed(trial, H100S).gpus == gpus
    filling = busy(64)
    assert Effort.of(filling).busy(gpu) == 1
    assert _placed(filling, H100S).gpus == 1


@pytest.mark.parametrize("mps", [False, True])
@pytest.mark.parametrize("sequences", [1, 4, 8, 12, 16, 24, 32, 64, 256, 1024])
def test_a_share_saves_gpu_seconds_or_is_not_taken(busy, sequences: int, mps: bool) -> None:
    cluster, trial = uniform(gpus=1, gpu_type="H100", mps=mps), busy(sequences)
    found, whole = _placed(trial, cluster), Placement(gpus=1)
    alone = seconds(trial, whole, cluster)
    unshared = place(trial, cluster, shares=False)
    assert isinstance(unshared, Placement)
    assert unshared.gpus == 1
    if found.gpus < 1:
        assert found.gpus * seconds(trial, found, cluster) * SHARE_GAIN <= alone
    halves = 1 / 2 * seconds(trial, Placement(gpus=1 / 2), cluster)
    assert found.gpus < 1 or halves * SHARE_GAIN > alone


def test_mps_lets_models_share_that_keep_a_gpu_busy_but_do_not_fill_it(busy) -> None:
    trial = busy(64)
    assert _placed(trial, uniform(gpus=1, gpu_type="H100")).gpus == 1
    assert _placed(trial, uniform(gpus=1, gpu_type="H100", mps=True)).gpus < 1


def test_while_one_trial_compiles_others_use_the_gpu(large) -> None:
    """A compute-bound trial whose compilation takes half of its time: two need no longer on halves
    than one after the other, less one compilation."""
    cluster, trial = uniform(gpus=1, gpu_type="H100"), large(512)
    training = seconds(trial, Placement(gpus=1), cluster)
    rows = Pace(compiled=((trial.shape.depth, training / 2.5),))
    assert _placed(trial, cluster).gpus == 1
    found = place(trial, cluster, rows)
    assert isinstance(found, Placement)
    assert found.gpus < 1


def test_no_gpu_is_shared_that_takes_one_process(busy) -> None:
    """Nor where one of several of its type does, since a trial may be sent to any."""
    trial = busy(1)
    node = Node(name="a", cpus=8, gpus=8, gpu_type="H100")
    assert _placed(trial, Cluster(nodes=(node,))).gpus == 1 / 8
    alone = dataclasses.replace(node, name="b", exclusive=True)
    assert _placed(trial, Cluster(nodes=(node, alone))).gpus == 1
    asked = _simulated(trial, gpus=0.25)
    assert _placed(asked, Cluster(nodes=(alone,))).gpus == 1


def test_what_a_core_trains_sooner_has_a_core_though_there_are_gpus(make_trial, large) -> None:
    """Two of mini's trials, by the time that CUDA takes to start; and never one in bf16."""
    tiny = make_trial(12, 2e9)
    found = _placed(tiny, H100S)
    assert (found.gpus, found.label) == (0, "1 core")
    assert _placed(make_trial(128, 1e12), H100S).gpus > 0
    h = dataclasses.replace(tiny.hyperparameters, precision="bf16")
    assert _placed(dataclasses.replace(tiny, hyperparameters=h), H100S).gpus > 0


def test_what_a_ledger_measured_decides_between_core_and_gpu(make_trial) -> None:
    """A GPU that was twenty times as slow as expected, as where its driver is none of torch's."""
    trial = make_trial(64, 1e11)
    assert _placed(trial, H100S).gpus > 0
    slow = Pace(measured={("H100 SXM", 1.0): ((1.0, 20.0),)})
    found = place(trial, H100S, slow)
    assert isinstance(found, Placement)
    assert found.gpus == 0


def test_a_share_holds_the_model_and_its_own_context(busy) -> None:
    """An eighth of a GPU of 8 GB is 1 GB, of which 0.9 may be used and CUDA's context takes 0.8."""
    trial = busy(1)
    taken = CONTEXT_BYTES + training_memory(trial.shape, trial.hyperparameters).peak
    for gigabytes, gpus in ((8, 1 / 8), (7, 1 / 4)):
        cluster = uniform(gpus=1, gpu_type="H100", gpu_memory=gigabytes * 1e9)
        found = _placed(trial, cluster)
        assert (found.gpus, found.bytes) == (gpus, pytest.approx(taken))
        assert gpus * gigabytes * 1e9 * (1 - HEADROOM) > taken


def test_nodes_of_one_name_are_taken_for_the_smallest_of_them(large) -> None:
    """80 and 40 GB, both of which Ray calls A100; width 2304 takes 46 GB at least."""
    node = Node(name="a", cpus=8, gpus=1, gpu_type="A100", reported=True)
    small, large_ = (
        dataclasses.replace(node, name=name, told=gpu_type(name))
        for name in ("A100 40GB", "A100 80GB")
    )
    assert isinstance(place(large(2304), Cluster(nodes=(large_,))), Placement)
    for nodes in ((small, large_), (large_, small)):
        assert _placed(large(2304), Cluster(nodes=nodes)).gpus == 2


def test_a_gang_has_room_for_the_buffers_of_its_messages(large) -> None:
    found = _placed(large(2368), H100S)
    assert found.gpus > 1
    trial = large(2368)
    taken = training_memory(trial.shape, trial.hyperparameters, gpus=int(found.gpus)).peak
    assert found.bytes == pytest.approx(CONTEXT_BYTES + NCCL_BYTES + taken)


def test_a_sequence_that_fits_nowhere_whole_is_computed_in_parts(large) -> None:
    """16,384 tokens x 16 blocks x 14 x 1024 floats are 15 GB, their inputs alone one."""
    cluster = uniform(gpus=1, gpu_type="T4")
    trial = large(1024, sequences=1, context=16_384)
    h, usable = trial.hyperparameters, (1 - HEADROOM) * 16e9
    assert CONTEXT_BYTES + training_memory(trial.shape, h).peak > usable
    found = _placed(trial, cluster)
    assert found.label == "1 GPU"
    assert found.bytes <= usable
    assert fitting_passes(trial.shape, h, usable - CONTEXT_BYTES).recomputed


def test_without_gpus_a_trial_is_a_core_and_its_memory(make_trial) -> None:
    found = _placed(make_trial(64, 1e10), uniform(cpus=4))
    assert (found.label, found.bundles) == ("1 core", ({"CPU": 1.0, "memory": 1_000_000_000},))


def test_without_gpus_a_large_trial_asks_for_what_it_takes_rounded_up(large) -> None:
    trial = large(512)
    taken = PROCESS_BYTES + training_memory(trial.shape, trial.hyperparameters).peak
    assert 4e9 < taken < 8e9
    found = _placed(trial, Cluster(nodes=(Node(name="x", cpus=8, memory_bytes=16e9),)))
    assert (found.label, found.memory_bytes) == ("1 core and 8 GB", 8_000_000_000)
    whole = _placed(trial, Cluster(nodes=(Node(name="x", cpus=3, memory_bytes=taken),)))
    assert whole.memory_bytes == int(taken)


def test_a_simulated_trial_asks_for_what_it_is_told(make_trial) -> None:
    trial = make_trial(16, 1e10)
    labels = {
        gpus: _placed(_simulated(trial, gpus=gpus), H100S).label
        for gpus in (0.0, 0.1, 0.125, 0.5, 1.0, 3.0, 8.0, 16.0, 64.0)
    }
    assert labels == {
        0: "1 core", 0.1: "1/8 GPU", 0.125: "1/8 GPU", 0.5: "1/2 GPU", 1: "1 GPU", 3: "3 GPUs",
        8: "8 GPUs", 16: "2 x 8 GPUs", 64: "8 x 8 GPUs",
    }  # fmt: skip


def test_a_number_of_gpus_that_is_no_part_of_a_node_and_no_equal_nodes_is_refused(
    make_trial,
) -> None:
    trial = make_trial(16, 1e10)
    for gpus, said in ((1.5, "1.5 GPUs, .* ask for 1 or 2"), (9.0, "9 GPUs, .* ask for 8 or 16")):
        found = place(_simulated(trial, gpus=gpus), H100S)
        assert isinstance(found, Unplaceable)
        assert re.search(said, found.shortfall)


def test_bundles_are_what_the_class_says(make_trial) -> None:
    """The leader of a gang takes nothing; its ranks' GPUs are a bundle a node."""
    four, sixteen = Placement(gpus=4), Placement(gpus=16, nodes=2)
    assert four.bundles == ({}, {"CPU": 4, "GPU": 4})
    assert four.strategy == "STRICT_PACK"
    assert sixteen.bundles == ({}, {"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8})
    assert Placement(gpus=1, gpu_type="H100").bundles[0]["accelerator_type:H100"] == 0.001


def test_a_trial_on_gpus_asks_for_main_memory_too(large, busy) -> None:
    """Of 3 GB a process, and a checkpoint's 12 bytes a parameter with the model's 4 more."""
    small = _placed(busy(1), H100S)
    assert small.gpus == 1 / 8
    assert small.bundles[0]["memory"] == 4e9
    trial = large(2048)
    state = 16 * params(trial.shape).total
    cluster = Cluster(nodes=(Node(name="x", cpus=8, gpus=1, gpu_type="B200", memory_bytes=1e12),))
    found = _placed(trial, cluster)
    assert 3e9 + state <= found.memory_bytes < 2 * (3e9 + state)
    poor = Node(name="x", cpus=8, gpus=1, gpu_type="B200", memory_bytes=9e9)
    assert _placed(trial, Cluster(nodes=(poor,))).memory_bytes == 9e9  # no more than there is
    gang = Placement(gpus=16, nodes=2, memory_bytes=64_000_000_000)
    assert [bundle.get("memory") for bundle in gang.bundles] == [None, 32e9, 32e9]


def test_trials_that_need_more_main_memory_than_a_node_has_wait_for_each_other() -> None:
    """Though there are GPUs: the queue sees it as Ray does."""
    node = Node(name="x", cpus=64, gpus=8, gpu_type="H100", memory_bytes=100e9)
    room = Room(Cluster(nodes=(node,)))
    placement = Placement(gpus=1.0, memory_bytes=32_000_000_000)
    for key in "abc":
        spot = room.find(placement)
        assert spot is not None
        room.take(key, placement, spot, 1.0)
    assert room.find(placement) is None


def test_classes_are_equal_whatever_their_trials_take() -> None:
    one, other = Placement(gpus=1, bytes=1e9), Placement(gpus=1, bytes=2e9)
    assert one == other
    assert len({one, other, Placement(gpus=2)}) == 2


def test_only_what_needs_the_larger_type_is_tied_to_it(large) -> None:
    """48 GB and 80 GB: width 1024 takes 23 GB, 1600 takes 60 GB."""
    nodes = [
        Node(name="a", cpus=8, gpus=1, gpu_type="H100"),
        Node(name="b", cpus=8, gpus=1, gpu_type="L40S"),
    ]
    cluster = Cluster(nodes=tuple(nodes))
    assert _placed(large(1024), cluster).gpu_type is None
    assert _placed(large(1600), cluster).gpu_type == "H100"


@pytest.mark.parametrize(
    ("width", "cluster", "shortfall"),
    [
        (
            4096,  # 12.9e9 x 20 = 258 GB, of a sequence 64 blocks x 4096 x 1024 floats, 1 GB
            uniform(gpus=1, gpu_type="H100"),
            r"needs 2[67]\d GB on 1 GPU; of the 80 GB of the cluster's, 72 GB may be used "
            r"\(10% is kept free\)",
        ),
        (64, uniform(gpus=8, cpus=0), r"needs 1 GPU and a core for each, .*\(taken for T4s\)"),
    ],
)
def test_what_fits_nowhere_is_named_with_its_shortfall(large, width, cluster, shortfall) -> None:
    trial = large(width)
    found = place(trial, cluster)
    assert isinstance(found, Unplaceable)
    assert re.search(rf"^trial {trial.key} \(width {width}, .* {shortfall}", str(found))


def test_where_ray_leaves_the_memory_open_a_refusal_says_how_to_tell_it(large) -> None:
    trial = large(2304)  # 2.3e9 parameters x 20 bytes = 46 GB
    node = Node(name="a", cpus=8, gpus=1, gpu_type="A100")
    refused = place(trial, Cluster(nodes=(node,)))
    assert '[cluster] gpu = "A100 80GB"' in refused.shortfall
    _placed(trial, as_told(Cluster(nodes=(node,)), "A100 80GB"))
    told = place(large(4096), uniform(gpus=1, gpu_type="A100 80GB"))
    assert "[cluster]" not in told.shortfall


def test_a_trial_that_no_class_can_hold_is_named_by_the_largest(large) -> None:
    """1.03e11 x 20 / 8 = 258 GB, two gathered blocks, 13, and 128 x 8192 x 1024 floats, 4."""
    found = place(large(8192), uniform(gpus=8, gpu_type="A100-40G"))
    assert re.match(r"needs 27\d GB on each of 8 GPUs; of the 40 GB", found.shortfall)


def test_sizes_that_differ_are_told_apart(large) -> None:
    """A GPU of which exactly a byte more than what may be used is needed."""
    trial = large(1024)
    taken = _placed(trial, H100S).bytes
    node = Node(name="a", cpus=1, memory_bytes=taken - 1e4 - (CONTEXT_BYTES - PROCESS_BYTES))
    found = place(trial, Cluster(nodes=(node,)))
    needed, there = re.findall(r"[\d.]+(?= GB)", found.shortfall)
    assert float(needed) > float(there)


def test_simulated_trials_that_fit_nowhere_are_named(make_trial) -> None:
    trial = make_trial(16, 1e10)
    wide = _simulated(trial, gpus=16)
    ours = uniform(nodes=1, gpus=8, gpu_type="H100")
    assert isinstance(place(trial, ours), Placement)
    found = place(wide, ours)
    assert found.shortfall == "needs 16 GPUs, and there are 8"
    head = uniform(cpus=0)
    assert "needs 1 CPU, and no node has one" in str(place(_simulated(trial), head))
    starved = uniform(gpus=8, cpus=2)
    assert "a core for each" in str(place(_simulated(trial, gpus=4), starved))


def test_a_batch_that_cannot_be_split_bounds_the_gpus(large) -> None:
    """Two sequences are for two GPUs at most, and half of this model fits on neither."""
    found = place(large(5120, sequences=2), H100S)
    assert isinstance(found, Unplaceable)
    assert "on each of 2 GPUs, and its batch of 2 splits no further" in found.shortfall


def test_a_core_needs_the_memory_of_a_pass(large) -> None:
    """16 sequences of 512 x 8 blocks x 15 floats a token are 4 GB, and 1.5 GB are all the rest."""
    for gigabytes, kind in ((7, Placement), (5, Unplaceable)):
        small = Cluster(nodes=(Node(name="a", cpus=2, memory_bytes=gigabytes * 1e9),))
        found = place(large(512), small)
        assert isinstance(found, kind)
    assert found.shortfall.endswith("of memory; the largest node has 5 GB")
