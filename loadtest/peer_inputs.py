"""The inputs of peers.py: captured traces, the batches made of them, and their float64 answers."""
import dataclasses
import json
import struct

PAGE = 64
DEVICE = "cuda"
E4M3_MAX = 448.0


@dataclasses.dataclass
class Trace:
    """A trace file (client/trace.h): q [q_heads, rows, d], k and v [kv_heads, tokens, d] in FP16."""

    name: str
    q: object
    k: object
    v: object
    positions: list
    softmax_scale: float


def load_trace(path):
    """Reads a safetensors trace into torch tensors on the host."""
    import torch

    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        body = bytearray(file.read())
    kinds = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32}

    def tensor(name):
        entry = header[name]
        begin, end = entry["data_offsets"]
        kind = kinds[entry["dtype"]]
        flat = torch.frombuffer(body, dtype=kind, offset=begin, count=(end - begin) // kind.itemsize)
        return flat.reshape(entry["shape"])

    return Trace(path.rsplit("/", 1)[-1], tensor("q"), tensor("k"), tensor("v"),
                 tensor("positions").tolist(), float(header["__metadata__"]["softmax_scale"]))


def random_trace(head_dim):
    """Normal q, k and v: attention without structure, as a check."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(torch.float16)

    return Trace(f"random:{head_dim}", normal(8, 64, head_dim), normal(2, 8192, head_dim),
                 normal(2, 8192, head_dim), list(range(8192 - 64, 8192)), head_dim**-0.5)


def join_heads(trace):
    """Pairs of kv heads side by side in channels; JoinHeads of bench_trace.h."""
    import torch

    pairs = trace.k.shape[0] // 2
    if pairs == 0:
        raise ValueError(f"{trace.name}: joining heads takes at least two kv heads")

    def join(tensor):
        return torch.cat((tensor[0:2 * pairs:2], tensor[1:2 * pairs:2]), dim=-1)

    q = join(trace.q.unflatten(0, (trace.k.shape[0], -1))).flatten(0, 1)
    return Trace(f"joined:{trace.name}", q, join(trace.k), join(trace.v), trace.positions,
                 trace.softmax_scale / 2**0.5)


@dataclasses.dataclass
class Case:
    trace: Trace
    batch: int
    kv_len: int
    q_heads: int
    kv_heads: int

    @property
    def name(self):
        d = self.trace.q.shape[-1]
        return f"d{d}_n{self.batch}_kv{self.kv_len}_h{self.q_heads}/{self.kv_heads}"

    def source_rows(self):
        """The trace row of each sequence; SourceRow of row_judge.cc."""
        tokens = min(self.kv_len, self.trace.k.shape[1])
        rows = sorted(range(len(self.trace.positions)),
                      key=lambda row: abs(self.trace.positions[row] + 1 - tokens))
        return [rows[sequence % len(rows)] for sequence in range(self.batch)]

    def source_head(self, sequence, q_head):
        """The trace's q head of a q head; likewise."""
        kv_heads = self.trace.k.shape[0]
        group, own = self.trace.q.shape[0] // kv_heads, self.q_heads // self.kv_heads
        kv_head = q_head // own
        turn = kv_head // kv_heads * own + q_head % own + sequence
        return kv_head % kv_heads * group + turn % group

    def queries(self):
        """[batch, q_heads, d] FP16."""
        import torch

        rows = self.source_rows()
        return torch.stack([torch.stack([self.trace.q[self.source_head(s, h), rows[s]]
                                         for h in range(self.q_heads)]) for s in range(self.batch)])

    def tokens(self, tensor):
        """`tensor` (the trace's k or v) as one sequence of the case: [kv_heads, kv_len, d]."""
        heads = tensor[[h % tensor.shape[0] for h in range(self.kv_heads)]]
        if self.kv_len <= heads.shape[1]:
            return heads[:, :self.kv_len]
        if self.kv_len % heads.shape[1]:
            raise ValueError(f"kv_len {self.kv_len} is no multiple of the trace's {heads.shape[1]}")
        return heads.repeat(1, self.kv_len // heads.shape[1], 1)


def find_trace(source):
    kind, _, rest = source.partition(":")
    if kind == "random":
        return random_trace(int(rest))
    return join_heads(load_trace(rest)) if kind == "joined" else load_trace(source)


def parse_case(text, traces):
    source, sizes, heads = text.rsplit(":", 2)
    if source not in traces:
        traces[source] = find_trace(source)
    batch, kv_len = sizes.split("x")
    q_heads, kv_heads = heads.split("/")
    return Case(traces[source], int(batch), int(kv_len), int(q_heads), int(kv_heads))


def as_bytes(tensor):
    import torch

    return tensor.contiguous().view(torch.uint8)


class Inputs:
    """A case on the GPU. K and V of one sequence; peers copy them into their own layouts."""

    def __init__(self, case):
        self.case = case
        self.q = case.queries().to(DEVICE)
        self.k = case.tokens(case.trace.k).to(DEVICE)
        self.v = case.tokens(case.trace.v).to(DEVICE)
        self.scale = case.trace.softmax_scale

    def cast(self, tensor, dtype):
        import torch

        if dtype == torch.float8_e4m3fn:
            tensor = tensor.float().clamp(-E4M3_MAX, E4M3_MAX)
        return tensor.to(dtype)

    def query(self, dtype):
        return self.cast(self.q, dtype)

    def contiguous(self, tensor, dtype, heads_first):
        """[batch, kv_heads, kv_len, d], or with tokens before heads."""
        one = self.cast(tensor, dtype)
        if not heads_first:
            one = one.transpose(0, 1)
        # By bytes: not every operation knows FP8.
        return as_bytes(one).unsqueeze(0).repeat(self.case.batch, 1, 1, 1).view(dtype)

    def paged(self, dtype):
        """K and V pages [pages, kv_heads, 64, d] in shuffled order, and the table of each sequence."""
        import torch

        per_sequence = self.case.kv_len // PAGE
        count = self.case.batch * per_sequence
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(DEVICE)

        def pages(tensor):
            one = self.cast(tensor, dtype)
            one = one.reshape(self.case.kv_heads, per_sequence, PAGE, -1).transpose(0, 1)
            out = torch.empty((count, *one.shape[1:]), dtype=dtype, device=DEVICE)
            for s in range(self.case.batch):
                places = order[s * per_sequence:(s + 1) * per_sequence]
                as_bytes(out)[places] = as_bytes(one)
            return out

        table = order.to(torch.int32).reshape(self.case.batch, per_sequence)
        return pages(self.k), pages(self.v), table

    def expected(self, sample):
        """{(sequence, q head): float64 output} of every n-th row, n odd, at most `sample`."""
        import torch

        heads, rows = self.case.q_heads, self.case.batch * self.case.q_heads
        stride = -(-rows // sample) | 1
        tokens = min(self.case.kv_len, self.case.trace.k.shape[1])  # tiles do not change the answer
        keys, values = {}, {}
        answers = {}
        for row in range(0, rows, stride):
            sequence, head = divmod(row, heads)
            kv_head = head * self.case.kv_heads // heads
            source = kv_head % self.case.trace.k.shape[0]
            if source not in keys:
                keys[source] = self.k[kv_head, :tokens].double()
                values[source] = self.v[kv_head, :tokens].double()
            scores = keys[source] @ self.q[sequence, head].double() * self.scale
            answers[sequence, head] = torch.softmax(scores, 0) @ values[source]
        return answers
