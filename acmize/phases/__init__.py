"""The training phases, each read top to bottom: distill, pretrain_gates, finetune, calibrate."""
