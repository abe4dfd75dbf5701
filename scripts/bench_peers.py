#!/usr/bin/env python3
"""Measures what a user would run instead of nitro, and nitro beside it, and prints the ratios.

    python3 -m venv venv && venv/bin/pip install torch diffusers transformers einops
    venv/bin/python scripts/bench_peers.py --nitro target/release/nitro --official path/to/Nitro-E

Peers, all with random weights (nothing is downloaded), on the CPU, in float32 and bfloat16, eager and
through torch.compile:

  * diffusers' AutoencoderDC in the shape of Sana's f32c32 autoencoder
  * transformers' LlamaModel in the shape of Llama 3.2 1B (no lm_head)
  * the official E-MMDiT, from a checkout of github.com/AMD-AGI/Nitro-E given with --official, and with it
    the whole way from token ids to pixels and a training step of the miniature

Times are medians of --runs after --warmup. The peers run with a malloc that keeps its memory between
calls, as PyTorch's guide to CPU performance advises; with glibc's defaults (--plain-malloc) page faults
cost the autoencoder up to half of its time. What was measured is kept in --cache (a JSON file) as soon as
it is known, so that a run that was cut off goes on where it was; --fresh forgets it, --fresh-nitro only
nitro's part of it. Progress goes to
standard error, the table to standard output.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time

WANTED = {
    # stage: [(nitro's precision, peer's precision, least speed-up wanted)], of issue 3
    "emmdit_512_b1": [("bf16", "bf16", 2.8)],
    "emmdit_512_b2": [("bf16", "bf16", 2.3)],
    "dcae_decode_512": [("bf16", "bf16", 1.7)],
    "dcae_encode_512": [("bf16", "bf16", 1.7)],
    "llama_128": [("bf16", "bf16", 1.15), ("int8", "bf16", 1.8)],
    "prompt_to_512_4steps": [("bf16", "bf16", 1.9), ("int8", "bf16", 2.3)],
    "train_step_mini": [("f32", "f32", 1.25), ("bf16", "bf16", 1.25)],
}
STAGES = [
    "emmdit_512_b1",
    "emmdit_512_b2",
    "emmdit_512_b8",
    "emmdit_1024_b1",
    "dcae_decode_512",
    "dcae_encode_512",
    "llama_128",
    "prompt_to_512_4steps",
    "prompt_to_512_20steps",
    "train_step_mini",
]
NEED_OFFICIAL = ("emmdit", "prompt", "train")
TEXT_TOKENS = 128

# huggingface.co/mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers, vae/config.json
DC_AE = dict(
    in_channels=3,
    latent_channels=32,
    attention_head_dim=32,
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    decoder_norm_types="rms_norm",
    decoder_act_fns="silu",
    scaling_factor=0.41407,
)
# huggingface.co/meta-llama/Llama-3.2-1B, config.json
LLAMA = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
# configs/miniature-stage2.yaml
MINIATURE = dict(
    sample_size=16,
    patch_size=1,
    in_channels=8,
    out_channels=8,
    num_attention_heads=6,
    attention_head_dim=32,
    caption_channels=128,
    caption_projection_dim=192,
    pos_embed_max_size=16,
)
MINIATURE_GROUPS = [1, 6, 1]
MINIATURE_BATCH, MINIATURE_TEXT = 32, 32


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def official(checkout):
    """The official model's class; its package is called `core`."""
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    from core.models.transformer_emmdit import EMMDiTTransformer

    return EMMDiTTransformer


def miniature(checkout):
    """The official model with the miniature's blocks: the class fixes its groups at 4, 16 and 4."""
    model = official(checkout)(**MINIATURE)
    groups, place = [], 0
    for group, count in zip(model.block_groups, MINIATURE_GROUPS):
        # From the end, because the last block of all has no text output.
        blocks = list(group)[len(group) - count :]
        for block in blocks:
            # The three forms of subregion attention take turns over all blocks.
            block.subsample_ratio = (1, 4, 4)[place % 3]
            block.subsample_seq_len = (1, 1, 4)[place % 3]
            place += 1
        groups.append(type(group)(blocks))
    model.block_groups = type(model.block_groups)(groups)
    model.block_split_stage = list(MINIATURE_GROUPS)
    return model


class Peer:
    """Models of one precision and mode, built when first needed and kept while they serve."""

    def __init__(self, torch, args, precision, mode):
        self.torch, self.args, self.precision, self.mode = torch, args, precision, mode
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.models = {}

    def get(self, name):
        if name not in self.models:
            # Stages come in the order of their models; a pipeline needs three.
            model = self.build(name).eval().requires_grad_(False).to(self.dtype)
            if self.mode == "compiled":
                if name == "dcae":
                    model.encode = self.torch.compile(model.encode)
                    model.decode = self.torch.compile(model.decode)
                else:
                    model = self.torch.compile(model)
            self.models[name] = model
        return self.models[name]

    def forget_all_but(self, names):
        for name in [n for n in self.models if n not in names]:
            del self.models[name]
        gc.collect()

    def build(self, name):
        self.torch.manual_seed(0)
        if name == "dcae":
            from diffusers import AutoencoderDC

            return AutoencoderDC(**DC_AE)
        if name == "llama":
            from transformers import LlamaConfig, LlamaModel

            return LlamaModel(LlamaConfig(**LLAMA))
        side = int(name.split("_")[1])
        return official(self.args.official)(sample_size=side // 32, use_sub_attn=side == 512)

    def random(self, *shape):
        return self.torch.randn(*shape).to(self.dtype)

    def stage(self, name):
        """A function that runs the stage once."""
        torch = self.torch
        if name == "train_step_mini":
            self.forget_all_but([])
            return self.train_step()
        if name == "llama_128":
            self.forget_all_but(["llama"])
            model = self.get("llama")
            ids = torch.randint(0, LLAMA["vocab_size"], (1, TEXT_TOKENS))
            mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
            return lambda: model(input_ids=ids, attention_mask=mask, use_cache=False)
        if name.startswith("dcae"):
            self.forget_all_but(["dcae"])
            model = self.get("dcae")
            if name.startswith("dcae_decode"):
                latent = self.random(1, 32, 16, 16)
                return lambda: model.decode(latent)
            image = self.random(1, 3, 512, 512)
            return lambda: model.encode(image)
        if name.startswith("emmdit"):
            _, side, batch = name.split("_")
            self.forget_all_but([f"emmdit_{side}"])
            return self.denoiser(f"emmdit_{side}", int(batch[1:]))
        return self.prompt_to_picture(20 if name.endswith("20steps") else 4)

    def denoiser(self, name, batch):
        model = self.get(name)
        side = int(name.split("_")[1]) // 32
        x, text = self.random(batch, 32, side, side), self.random(batch, TEXT_TOKENS, 2048)
        time = self.torch.full((batch,), 500.0)
        return lambda: model(x, text, time, return_dict=False)

    def prompt_to_picture(self, steps):
        """As the official pipeline does it: prompt (and with 20 steps the empty prompt) through the
        text encoder, Euler steps, decoding."""
        torch = self.torch
        names = ["llama", "emmdit_512", "dcae"]
        self.forget_all_but(names)
        llama, transformer, dcae = map(self.get, names)
        guided = steps == 20
        rows = 2 if guided else 1
        ids = torch.randint(0, LLAMA["vocab_size"], (rows, 1, TEXT_TOKENS))
        mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
        mask[:, 20:] = 0
        noise = torch.randn(1, 32, 16, 16)
        sigmas = torch.linspace(1, 1 / steps, steps).tolist() + [0.0]

        def run():
            texts = [llama(input_ids=i, attention_mask=mask, use_cache=False)[0] for i in ids]
            text = torch.cat(texts)
            x = noise
            for now, after in zip(sigmas, sigmas[1:]):
                time = torch.full((rows,), now * 1000)
                batch = x.repeat(rows, 1, 1, 1).to(self.dtype)
                v = transformer(batch, text, time, return_dict=False)[0].float()
                if guided:
                    v = v[:1] + 4.5 * (v[1:] - v[:1])
                x = x + (after - now) * v
            image = dcae.decode(x.to(self.dtype) / DC_AE["scaling_factor"]).sample
            return (image.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)

        return run

    def train_step(self):
        torch = self.torch
        torch.manual_seed(0)
        model = miniature(self.args.official).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2
        )
        forward = torch.compile(model) if self.mode == "compiled" else model
        x = torch.randn(MINIATURE_BATCH, 8, 16, 16)
        text = torch.randn(MINIATURE_BATCH, MINIATURE_TEXT, 128)
        target = torch.randn(MINIATURE_BATCH, 256, 8)
        time = torch.rand(MINIATURE_BATCH) * 1000
        parameters = list(model.parameters())

        def run():
            with torch.enable_grad():
                with torch.autocast("cpu", self.dtype, enabled=self.precision == "bf16"):
                    tokens, _ = forward(x, text, time)
                loss = (tokens.float() - target).pow(2).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run


def measure(run, warmup, runs, budget):
    """Median time in milliseconds; at least three runs, fewer than `runs` if they take long."""
    for _ in range(warmup):
        start = time.perf_counter()
        run()
        if time.perf_counter() - start > 3:
            break
    times, begun = [], time.perf_counter()
    while len(times) < runs and (len(times) < 3 or time.perf_counter() - begun < budget):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure_peers(args, known, save):
    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    known["torch"] = torch.__version__
    for precision in args.precision:
        for mode in args.mode:
            peer = Peer(torch, args, precision, mode)
            for stage in args.stages:
                key = f"{stage} {precision} {mode}"
                if key in known:
                    continue
                if not args.official and stage.startswith(NEED_OFFICIAL):
                    continue
                say(f"PyTorch {precision} {mode}: {stage}")
                try:
                    inference = stage != "train_step_mini"
                    with torch.inference_mode() if inference else contextlib.nullcontext():
                        known[key] = measure(peer.stage(stage), args.warmup, args.runs, args.budget)
                except Exception as error:  # one peer that fails leaves the others
                    say(f"  failed: {type(error).__name__}: {str(error)[:300]}")
                    continue
                say(f"  {known[key]:.1f} ms")
                save()
            peer.forget_all_but([])


def measure_nitro(args, known, save):
    for precision in args.nitro_precision:
        key = f"nitro {precision}"
        missing = [s for s in args.stages if s not in known.get(key, {}).get("times", {})]
        if not missing:
            continue
        command = [args.nitro, "bench", "--json", "--precision", precision]
        command += ["--threads", str(args.threads), "--stages", ",".join(missing)]
        say(" ".join(command))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            say(f"  nitro could not be measured in {precision} (exit code {done.returncode})")
            continue
        result = json.loads(done.stdout)
        entry = known.setdefault(key, {"times": {}, "percent": {}})
        entry["peaks"] = result["peaks"]
        for stage in result["stages"]:
            entry["times"][stage["name"]] = stage["median_ms"]
            entry["percent"][stage["name"]] = stage["percent_of_peak"]
        save()


def keep_memory():
    """Starts this program again with glibc's malloc told to give nothing back: it reads these once."""
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable] + sys.argv)


def cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def report(args, known):
    columns = [(p, m) for p in args.precision for m in args.mode]
    nitro = [p for p in args.nitro_precision if f"nitro {p}" in known]
    print(f"{cpu_name()}, {args.threads} threads; PyTorch {known.get('torch')}; times in ms\n")
    head = ["stage"] + [f"torch {p} {m}" for p, m in columns] + [f"nitro {p}" for p in nitro]
    rows = []
    for stage in args.stages:
        cells = [known.get(f"{stage} {p} {m}") for p, m in columns]
        cells += [known[f"nitro {p}"]["times"].get(stage) for p in nitro]
        rows.append([stage] + ["-" if c is None else f"{c:.1f}" for c in cells])
    table(head, rows)

    print("\nratios: the peer's time over nitro's\n")
    rows = []
    for stage in args.stages:
        wanted = {(ours, theirs): least for ours, theirs, least in WANTED.get(stage, [])}
        for ours in nitro:
            # int8 has no peer of its own here and is held against bf16.
            theirs = "bf16" if ours == "int8" else ours
            time = known[f"nitro {ours}"]["times"].get(stage)
            if time is None:
                continue
            peak = known[f"nitro {ours}"]["percent"].get(stage)
            cells = []
            for mode in args.mode:
                peer = known.get(f"{stage} {theirs} {mode}")
                cells.append("-" if peer is None else f"{peer / time:.2f}x")
            least = wanted.get((ours, theirs))
            eager = known.get(f"{stage} {theirs} eager")
            verdict = ""
            if least is not None and eager is not None:
                verdict = "reached" if eager / time >= least else "missed"
            rows.append(
                [stage, f"nitro {ours} / torch {theirs}"]
                + cells
                + ["" if least is None else f"{least:.2f}x", verdict]
                + ["-" if peak is None else f"{peak:.0f} %"]
            )
    table(["stage", "against"] + args.mode + ["wanted", "", "of peak"], rows)

    if "nitro bf16" in known and "nitro int8" in known:
        print("\nnitro's int8 against its bf16 (wanted: 1.30x for E-MMDiT and text encoder)\n")
        bf16, int8 = (known[f"nitro {p}"]["times"] for p in ("bf16", "int8"))
        both = [stage for stage in args.stages if stage in bf16 and stage in int8]
        table(["stage", "ratio"], [[s, f"{bf16[s] / int8[s]:.2f}x"] for s in both])


def table(head, rows):
    widths = [max(len(row[i]) for row in [head] + rows) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths]] + rows:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = lambda text: [item for item in text.split(",") if item]
    parser.add_argument("--nitro", help="the nitro binary; without it only peers are measured")
    parser.add_argument("--official", help="checkout of github.com/AMD-AGI/Nitro-E")
    parser.add_argument("--stages", type=listed, default=STAGES)
    parser.add_argument("--precision", type=listed, default=["f32", "bf16"], help="of the peers")
    parser.add_argument("--mode", type=listed, default=["eager", "compiled"])
    parser.add_argument("--nitro-precision", type=listed, default=["f32", "bf16", "int8"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--budget", type=float, default=15, help="seconds of runs per stage")
    parser.add_argument("--cache", default="bench_peers.json")
    parser.add_argument("--fresh", action="store_true", help="forget what --cache holds")
    parser.add_argument("--fresh-nitro", action="store_true", help="forget nitro's times only")
    parser.add_argument("--plain-malloc", action="store_true", help="leave malloc as it is")
    args = parser.parse_args()
    if not args.plain_malloc:
        keep_memory()
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stages {unknown}; there are {', '.join(STAGES)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))

    known = {}
    if not args.fresh and os.path.exists(args.cache):
        with open(args.cache) as file:
            known = json.load(file)
    if args.fresh_nitro:
        known = {key: value for key, value in known.items() if not key.startswith("nitro ")}

    def save():
        with open(args.cache + ".part", "w") as file:
            json.dump(known, file, indent=1)
        os.replace(args.cache + ".part", args.cache)

    if args.nitro:
        measure_nitro(args, known, save)
    if any(f"{s} {p} {m}" not in known for s in args.stages for p in args.precision for m in args.mode):
        measure_peers(args, known, save)
    report(args, known)


if __name__ == "__main__":
    main()
