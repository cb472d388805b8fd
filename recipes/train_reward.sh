#!/bin/sh
# TRL's own command trains the reward model: LoRA, its head saved with it.
exec trl reward --model_name_or_path real/base --dataset_name real/preferences --output_dir real/reward_model \
  --use_peft --lora_r 16 --lora_alpha 32 --lora_task_type SEQ_CLS --lora_modules_to_save score \
  --learning_rate 2e-4 --num_train_epochs 1 --max_length 512 \
  --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --per_device_eval_batch_size 4 \
  --gradient_checkpointing false --bf16 false --eval_strategy epoch --logging_steps 10 --save_strategy no --report_to none
