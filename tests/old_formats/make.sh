# bash tests/old_formats/make.sh EMPTY_FOLDER: writes the folders beside this file with the code of commit fe5c21f, on
# one CPU. It drops TensorBoard's events (they name the host), reads.png and the export of run_complete.
set -euo pipefail; here=$(realpath "$(dirname "$0")")
git -C "$here/../.." archive fe5c21f lad_dist launch tests/toy.py | tar -x -C "$1"; cd "$1"
export PYTHONPATH=.:tests OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu
python -c '
import lad_dist, tomli_w, toy; from pathlib import Path; assert Path(lad_dist.__file__).is_relative_to(Path.cwd())
teacher = Path("inputs/teacher"); toy.train_wordpiece(map(toy.sentence, range(500)), 60, teacher)
sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=0.5)
toy.model(teacher, teacher, "classification", toy.LABELS, max_position_embeddings=32, **sizes)
tables = toy.task_config(Path("runs"), toy.task_files(Path("inputs"), train=16, dev=8), teacher, teacher)
Path("toy.toml").write_text(tomli_w.dumps(tables))'
run() { python launch/task_distill.py toy.toml student.depth=1 run.name="$@"; }
mkdir -p runs/run_interrupted; touch runs/run_interrupted/STOP
run run_interrupted teacher.cache=teacher_cache || test $? = 75  # after the first step
run run_complete teacher.cache=teacher_cache
run export 'surgery=[{name="low_rank", keep=0.5, embeddings=0.5}, {name="prune", sparsity=0.5}]'
run export_masked 'surgery=[{name="prune", sparsity=0.5, criterion="adapting", modules="(embeddings|layer)[.]"}]' \
    deepspeed.bf16.enabled=true deepspeed.zero_optimization.stage=1
python -c '
import json, torch, toy; from lad_dist.compact import load, load_masked
from transformers import AutoModelForSequenceClassification as Ordinary, AutoTokenizer
text = toy.sentence(7, most=6); ids = AutoTokenizer.from_pretrained("inputs/teacher")(text)["input_ids"]
def logits(model): model.set_attn_implementation("sdpa"); return model(input_ids=torch.tensor([ids])).logits[0].tolist()
def both(folder): return {"ordinary": logits(Ordinary.from_pretrained(folder)), "compact": logits(load(folder))}
masked = both("runs/export_masked/export") | {"masked": logits(load_masked("runs/export_masked/export"))}
answers = {"text": text, "input_ids": ids, "export": both("runs/export/export"), "export_masked": masked}
open("logits.json", "w").write(json.dumps(answers, indent=1) + "\n")'
rm -r runs/*/tensorboard runs/run_complete/{reads.png,export}; mv runs/export_masked/export export_masked
cp -r export_masked runs/export/export runs/run_* inputs teacher_cache logits.json "$here"; chmod -R u=rwX,go=rX "$here"
