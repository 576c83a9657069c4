"""What logging, checkpoints and safeguards add to the training steps of a run.

    python benchmarks/logging_overhead.py --config configs/demo.txt --i_img 500 --i_print 100 --blocks 2

Takes --blocks times --i_img steps as run_nerf.py does. Overhead is the time for the checks for finite
gradients and collapse, the progress bar, log file, TensorBoard, checkpoints and held-out view. Test
views and videos are left out.
"""
from common import build, clock, parse, write_json

from run_nerf import set_learning_rate
from training.console import Console
from training.evaluation import Evaluator
from training.processes import Processes
from training.start import start_run
from training.time_plan import NEVER


def main():
    bench, args = parse(__doc__, ('--blocks', {'type': int, 'default': 5, 'help': 'times --i_img steps'}))
    args.N_iters = args.i_testset = args.i_video = NEVER
    run, console, processes = build(args), Console(), Processes(1)
    evaluator = Evaluator(args, run.scene, run.frames, processes, console.say)
    plan, logger, rays, safeguards, checkpoints = start_run(
        args, run.scene, (run.path, run.state), run.kwargs_train, run.optimizer, run.start, run.frames,
        console, processes)
    run = run._replace(rays=rays)

    training = overhead = 0.0
    num_steps = bench.blocks * args.i_img
    for _, step in zip(range(num_steps), logger.steps()):
        began = clock(run.device)
        batch, measures = run.backpropagate(step)
        gradient_done = clock(run.device)
        finite = safeguards.all_finite(measures)
        checked = clock(run.device)
        run.update(step, measures, finite)
        updated = clock(run.device)
        lrate = set_learning_rate(run.optimizer, args.lrate, args.lrate_decay, step)
        safeguards.recover(step, measures, checkpoints, processes)
        plan.after_step(step)
        logger.finish_step(step, len(batch.target), measures, lrate, safeguards)
        checkpoints.save_if_due(step, safeguards.is_healthy)
        evaluator.run_if_due(step, logger)
        training += gradient_done - began + updated - checked
        overhead += checked - gradient_done + clock(run.device) - updated
    training_ms, overhead_ms = 1e3 * training / num_steps, 1e3 * overhead / num_steps
    print(f'per step: training {training_ms:.2f} ms, overhead {overhead_ms:.2f} ms')
    print(f'added: {overhead / training:.2%}')
    write_json(bench.json, {'config': args.expname, 'training ms': training_ms, 'overhead ms': overhead_ms})


if __name__ == '__main__':
    main()
