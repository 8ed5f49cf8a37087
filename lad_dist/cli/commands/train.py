"""Commands that train: pretrain, finetune, distill."""

import contextlib

from lad_dist.cli.console import Console, loading_libraries, print_table, say
from lad_dist.config.errors import EXIT_DONE, EXIT_RUN_AGAIN
from lad_dist.config.schema import PretrainConfig, TaskConfig, TrainConfig


def pretrain(config: PretrainConfig) -> int:
    """Pre-train a small encoder on token shards, from a teacher or from the text alone.

    usage: lad-dist pretrain CONFIG [key=value …]
           deepspeed launch/pretrain_distill.py CONFIG [key=value …]   (or torchrun, or srun python)
           deepspeed --module lad_dist.cli pretrain CONFIG [key=value …]

    example: deepspeed launch/pretrain_distill.py configs/pretrain/minilm2.toml run.steps=10_000
    """
    return run_training(config)


def finetune(config: TaskConfig) -> int:
    """Fine-tune a model for a task: the teacher of a later distillation.

    usage: lad-dist finetune CONFIG [key=value …]
           deepspeed launch/finetune_teacher.py CONFIG [key=value …]   (or torchrun, or srun python)

    example: lad-dist finetune configs:task/teacher.toml data.task=rte run.name=teacher-rte
    """
    return run_training(config)


def distill(config: TaskConfig) -> int:
    """Distil a fine-tuned teacher into a small student for one task.

    usage: lad-dist distill CONFIG [key=value …]
           deepspeed launch/task_distill.py CONFIG [key=value …]   (or torchrun, or srun python)

    example: lad-dist distill configs:task/lad.toml data.task=rte teacher.path=runs/teacher-rte/export run.name=lad-rte
    """
    return run_training(config)


def run_training(config: TrainConfig) -> int:
    """Train with progress on the terminal, and print where everything is."""
    with loading_libraries():
        from lad_dist.runs.model_card import scored_on, student_rows, teacher_rows
        from lad_dist.training.train import RunStatus, train

    with contextlib.closing(Console(config.run.name)) as console:
        result = train(config, report=console)
    if result.status is RunStatus.STOPPED:
        say(f"{result.folder}: stopped early and saved; run the same command again to go on")
        return EXIT_RUN_AGAIN
    assert result.results is not None
    student, teacher = student_rows(result.results), teacher_rows(result.results)
    if teacher:
        rows = [(name, value, teacher.get(name, "")) for name, value in student.items()]
        print_table(config.run.name, ("", "student", "teacher"), rows)
    else:
        print_table(config.run.name, ("", "model"), list(student.items()))
    say(f"metrics are those of {scored_on(result.results)}")
    if config.run.best_metric is not None:
        say(f"exported: {result.results['selection']}")
    if skipped := result.results.get("skipped_updates"):  # results of earlier versions lack it
        say(f"{skipped} of {result.results['steps']} updates were skipped: {result.folder}/skipped_steps.json says why")
    say(f"model in {result.export_dir}, curves: tensorboard --logdir {result.folder}")
    return EXIT_DONE
