#!/usr/bin/env bash
# The losses of Table 3, and L_D from half-way on, on simulated THUMOS14 of difficulty hard: docs/studies.md.
#
#   benchmarks/simulated_study.sh GT_JSON OUT [d2net study ablation's options]
#
# GT_JSON: THUMOS14's annotations in CoLA's form (docs/data.md). The released network, one draw of the features (seed 100;
# difficulty was calibrated on seeds 0 and 1), five trainings of each row; about 45 s a training on one core.
set -euo pipefail
gt="$1" out="$2"
shift 2
late="training.denoising_start=1000"
exec python -m d2net study ablation --data "simulated,width=64,difficulty=hard,seed=100:$gt" --recipe thumos14-paper \
  --seeds 5 --threads 1 --device cpu --out "$out" \
  --set training.iterations=2000 --set training.max_snippets=200 --set training.learning_rate=5e-4 \
  --set model.embedding_dim=64 --set model.residual=true --set model.weight_std=0.01 --set model.dropout=0.7 \
  --variant "dis: loss.alpha_snippet=0 loss.alpha_video=0" \
  --variant "cross-entropy: loss.alpha_snippet=0 loss.alpha_video=0 loss.classification=cross_entropy" \
  --variant "focal: loss.alpha_snippet=0 loss.alpha_video=0 loss.classification=focal" \
  --variant "ds-half: loss.alpha_snippet=0.2 loss.alpha_video=0 $late" \
  --variant "both0.2-start: loss.alpha_snippet=0.2 loss.alpha_video=0.2" \
  --variant "both0.2-half: loss.alpha_snippet=0.2 loss.alpha_video=0.2 $late" \
  "$@"
