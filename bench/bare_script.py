"""Do the same DeepSpeed run as one zinfer job, as a person would without zinfer.

bench.py compares zinfer with it.

    python bench/bare_script.py MODEL_FOLDER DEEPSPEED_JSON \\
        BATCH PROMPT_TOKENS NEW_TOKENS WARMUP REPEATS

Prints one JSON line: the total seconds of each timed generation.
"""

import json
import os
import sys
import time

folder, ds_file = sys.argv[1:3]
batch, prompt_tokens, new_tokens, warmup, repeats = (int(argument) for argument in sys.argv[3:8])
os.environ.update(
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT=os.environ.get("MASTER_PORT", "29571"),
)

import deepspeed  # noqa: E402  the environment comes first
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: E402

with open(ds_file) as file:
    ds = json.load(file)
nvme_path = ds["zero_optimization"].get("offload_param", {}).get("nvme_path")
if nvme_path:
    os.makedirs(nvme_path, exist_ok=True)
deepspeed.init_distributed(dist_backend="gloo")
alive = HfDeepSpeedConfig(ds)
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
engine = deepspeed.initialize(model=model, config=ds)[0]
engine.module.eval()
ids = torch.randint(
    4, model.config.vocab_size, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0)
)
seconds = []
for index in range(warmup + repeats):
    start = time.perf_counter()
    with torch.no_grad():
        out = engine.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
    if index >= warmup:
        seconds.append(time.perf_counter() - start)
    assert out.shape[1] == prompt_tokens + new_tokens
print(json.dumps({"total_s": seconds}))
sys.stdout.flush()
os._exit(0)
