"""A training step on many GPUs under torch's DDP and FSDP2: predicted, not measured, from bytes, FLOPs and links.

L layers; N parameters, of which R are outside of the blocks: embeddings and the last norm. Each GPU has its own batch.
"""

import math
from dataclasses import dataclass

from fastgpt.accounting import PRESETS, Shape, count_parameters

from .paper import BATCH, H200, SIZES, TOKENS, adamw_work, rounded, seconds, training_work
from .tables import markdown_table

N_GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 GPUs. Rates are bytes/s of one GPU in one direction, times those of one collective operation.

    node_rate: to the GPUs of its node. network_rate: through the network card of its own. node_hop_s, network_hop_s:
    until a message arrives at the next GPU of a ring. start_s: until a collective operation begins.
    """

    node_rate: float = 4.5e11
    network_rate: float = 5.0e10
    node_hop_s: float = 1.9e-6
    network_hop_s: float = 4.0e-6
    start_s: float = 14e-6
    n_node_gpus: int = 8


# Assumed: NVLink and 400 Gbit/s for each GPU from the data sheets, times from NCCL's own model of a ring (LL128).
CLUSTER = Cluster()

# --- what is sent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Collective operations of one kind in a step: how many, and the bytes of the whole tensors that they work on.

    rounds: how often the tensors go around the ring: twice in an all-reduce, once in a gather or a reduce-scatter.
    """

    kind: str
    n_operations: int
    n_bytes: int
    rounds: int

    def sent_bytes(self, n_gpus: int) -> float:
        """What one GPU sends; it receives as much."""
        return self.rounds * self.n_bytes * (n_gpus - 1) / n_gpus

    def seconds(self, n_gpus: int, cluster: Cluster) -> float:
        """The time on rings through all GPUs, of which each network card carries one.

        So within a node every GPU sends all bytes, and through its network card an eighth of them. An all-reduce may
        also go up and down a tree of the nodes, which takes fewer steps.
        """
        n_nodes = math.ceil(n_gpus / cluster.n_node_gpus)
        rate = cluster.node_rate if n_nodes == 1 else min(cluster.node_rate, cluster.n_node_gpus * cluster.network_rate)
        crossings = n_nodes if n_nodes > 1 else 0
        steps_s = crossings * cluster.network_hop_s + (n_gpus - 1 - crossings) * cluster.node_hop_s
        if self.kind == "all_reduce":
            n_inside = min(n_gpus, cluster.n_node_gpus) - 1
            tree_s = n_inside * cluster.node_hop_s + math.log2(n_nodes) * cluster.network_hop_s
            steps_s = min(steps_s, tree_s)
        return self.sent_bytes(n_gpus) / rate + self.n_operations * (cluster.start_s + self.rounds * steps_s)


def ddp_traffic(shape: Shape) -> list[Traffic]:
    """The float32 gradients, 4 N bytes, are reduced for all, in buckets of 25 MiB of which the first has 1 MiB."""
    n_bytes = 4 * count_parameters(shape).total
    n_buckets = 1 + math.ceil(max(0, n_bytes - 2**20) / (25 * 2**20))
    return [Traffic("all_reduce", n_buckets, n_bytes, rounds=2)]


def fsdp2_traffic(shape: Shape, weight_bytes: int = 2) -> list[Traffic]:
    """Weights are gathered and float32 gradients scattered, block by block and once for what is outside of the blocks.

    The blocks' weights are gathered in forward and again in backward, the others once. weight_bytes: of an element.
    """
    total, outside = count_parameters(shape).total, outside_blocks(shape)
    gathered = weight_bytes * (2 * (total - outside) + outside)
    return [
        Traffic("all_gather", 2 * shape.n_layer + 1, gathered, rounds=1),
        Traffic("reduce_scatter", shape.n_layer + 1, 4 * total, rounds=1),
    ]


def outside_blocks(shape: Shape) -> int:
    """R: the token embedding, which is the head too, the position embedding, and the last norm."""
    return (shape.vocab_size + shape.n_positions + 2) * shape.n_embd


# --- a step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A training step on several GPUs; all figures are those of one of them.

    hidden_s: its time if as much communication as possible runs during the backward pass (FSDP2: and the forward pass).
    exposed_s: its time if none does. state_bytes: of the weights, gradients and moments that it holds.
    """

    sent_bytes: float
    communication_s: float
    hidden_s: float
    exposed_s: float
    state_bytes: float


def ddp(shape: Shape, n_gpus: int, cluster: Cluster = CLUSTER) -> Step:
    """Every GPU holds everything."""
    n = count_parameters(shape).total
    return _step(shape, ddp_traffic(shape), n_gpus, cluster, overlap=2 / 3, n_held=n)


def fsdp2(shape: Shape, n_gpus: int, cluster: Cluster = CLUSTER) -> Step:
    """Every GPU holds a share."""
    n = count_parameters(shape).total
    return _step(shape, fsdp2_traffic(shape), n_gpus, cluster, overlap=1.0, n_held=math.ceil(n / n_gpus))


def _step(shape: Shape, traffic: list[Traffic], n_gpus: int, cluster: Cluster, overlap: float, n_held: int) -> Step:
    """overlap: the part of the passes that communication can overlap. n_held: the parameters that a GPU holds."""
    passes_s = seconds(training_work(shape, BATCH, TOKENS), H200)
    communication_s = sum(part.seconds(n_gpus, cluster) for part in traffic)
    adamw_s = adamw_work(n_held).seconds(H200)
    return Step(
        sent_bytes=sum(part.sent_bytes(n_gpus) for part in traffic),
        communication_s=communication_s,
        hidden_s=(1 - overlap) * passes_s + max(overlap * passes_s, communication_s) + adamw_s,
        exposed_s=passes_s + communication_s + adamw_s,
        state_bytes=16 * n_held,
    )


# --- the page -------------------------------------------------------------------------------------------------------


def page() -> str:
    """A table for each number of GPUs."""
    blocks = [
        f"{BATCH} x {TOKENS} tokens on each GPU, bfloat16, AdamW in float32; GPUs at {H200.bandwidth / 1e12:.1f} TB/s, "
        f"{H200.matrix_rate / 1e12:.0f} TFLOP/s and {1e6 * H200.launch_s:.0f} us a launch, in nodes of "
        f"{CLUSTER.n_node_gpus} with {CLUSTER.node_rate / 1e9:.0f} GB/s between them and "
        f"{CLUSTER.network_rate / 1e9:.0f} GB/s of network each; {1e6 * CLUSTER.start_s:.0f} us for a collective "
        f"operation and {1e6 * CLUSTER.node_hop_s:.1f} us for each of its steps within a node, "
        f"{1e6 * CLUSTER.network_hop_s:.1f} us between nodes. Where two times are given, the first is with all "
        "communication hidden behind the passes that can hide it, the second with none."
    ]
    for n_gpus in N_GPUS:
        blocks += [f"**{n_gpus} GPUs**", _table(n_gpus)]
    return "\n\n".join(blocks)


def _table(n_gpus: int) -> str:
    rows = []
    for name in SIZES:
        one_gpu_s = ddp(PRESETS[name], 1).hidden_s
        for kind, step in {"DDP": ddp(PRESETS[name], n_gpus), "FSDP2": fsdp2(PRESETS[name], n_gpus)}.items():
            times = step.hidden_s, step.exposed_s
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{step.sent_bytes / 1e9:.2f} GB in {1e3 * step.communication_s:.1f} ms",
                    f"{1e3 * times[0]:.1f} - {1e3 * times[1]:.1f} ms",
                    " - ".join(rounded(n_gpus * BATCH * TOKENS / time_s) for time_s in times),
                    " - ".join(f"{one_gpu_s / time_s:.0%}" for time_s in times),
                    f"{step.state_bytes / 1e6:,.0f} MB",
                ]
            )
    headings = ["predicted", "sent by a GPU", "step", "tokens/s of all", "of one GPU's speed", "state of a GPU"]
    return markdown_table(headings, rows)
