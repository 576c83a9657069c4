"""`--minutes`: as many steps as end in time, with test views and video."""
import math
import time

# Importing torch and others takes about this long, before the console is there.
IMPORT_SECONDS = time.process_time()
# The first plan is made after so many steps, or this share of the time: steps and frames take several times
# as long while the occupancy grid is full.
FIRST_STEPS, FIRST_SHARE = 300, 0.2
# Test views and video are each left out if all of them would take more than this share of the time.
MAX_OUTPUT_SHARE = 0.4
# What they take is measured again after this share of the time; a measured frame takes about the other share.
MEASURE_SHARE, FRAME_SHARE = 0.05, 0.005
# The first measurement renders about this many pixels of a frame.
FIRST_PIXELS = 2500
# Metrics and files of a pixel take about this many seconds.
SECONDS_PER_WRITTEN_PIXEL = 2e-7
# A plan is shown again when its number of steps has changed by this factor.
SHOWN_FACTOR = 1.1
# The interval of outputs that are not made.
NEVER = 10 ** 9


class TimePlan:
    """Chooses --N_iters for --minutes while a run trains: after the first steps, and then whenever half of
    the time or the steps that were left have passed, from the speed since the last plan. --lrate_decay
    changes in proportion: the learning rate falls as far as in the given --N_iters. Test views and video are
    made after the last step.

    Args:
      args: the options, which are changed if --minutes is given.
      scene: a `Scene`.
      state: the content of the checkpoint that the run resumes, or None.
      start: number of steps done.
      frames: a `FrameRenderer`.
      processes: a `Processes`; rank 0 plans.
      console: a `Console`.
    """

    def __init__(self, args, scene, state, start, frames, processes, console):
        self.args, self.scene, self.frames, self.processes = args, scene, frames, processes
        self.say, self.started_at = console.say, console.started_at
        self.seconds_before = (state or {}).get('seconds', 0.0)  # in earlier processes
        if args.minutes is None:
            return
        self.seconds, self.decay_per_step = 60 * args.minutes, args.lrate_decay / args.N_iters
        self.stride, self.measured_at, self.measured, self.shown = None, -math.inf, None, 0
        taken = processes.from_rank0(self.seconds_taken)
        if start and taken >= self.seconds:  # what is missing is still written
            self.adopt(start, start, ('video', 'test views'))
        else:
            guess = round(start * self.seconds / max(taken, 1)) if start else args.N_iters
            self.adopt(start, max(start + 1, guess), (), FIRST_SHARE * (self.seconds - taken))
            self.next_step = min(self.next_step, start + FIRST_STEPS)

    def seconds_taken(self):
        """By the run, until now."""
        return self.seconds_before + IMPORT_SECONDS + time.perf_counter() - self.started_at

    def adopt(self, step, N_iters, outputs, wait=0.0):
        """After `step` steps, change the options to a plan: the number of steps, and what is made after the
        last one. The next plan is made in `wait` seconds, or when half of these steps are done."""
        args = self.args
        args.N_iters, args.lrate_decay = N_iters, self.decay_per_step * N_iters
        args.i_video, args.i_testset = (N_iters if name in outputs else NEVER
                                        for name in ('video', 'test views'))
        self.step, self.began_at = step, time.perf_counter()
        self.next_at, self.next_step = self.began_at + wait, math.ceil((step + N_iters) / 2)

    def after_step(self, step):
        """Plan again if that is due."""
        if self.args.minutes is None:
            return
        is_due = time.perf_counter() >= self.next_at or step >= self.next_step
        if self.processes.any(is_due):
            self.adopt(step, *self.processes.from_rank0(lambda: self.plan(step)))

    def plan(self, step):
        """The number of steps; what is made after the last one, a dict name -> seconds; and in how many
        seconds to plan again."""
        elapsed = time.perf_counter() - self.began_at
        outputs, too_long = self.affordable(self.output_seconds())
        left = self.seconds - self.seconds_taken() - sum(outputs.values())
        N_iters = step + max(math.ceil(left / elapsed * (step - self.step)), 0)
        if not 1 / SHOWN_FACTOR < N_iters / max(self.shown, 1) < SHOWN_FACTOR:
            self.shown = N_iters
            then = f', then {" and ".join(outputs)} in {sum(outputs.values()):.0f} s' if outputs else ''
            without = ''.join(f'; no {name}: {seconds:.0f} s' for name, seconds in too_long.items())
            self.say(f'plan for {self.args.minutes:g} min: {N_iters} steps{then}{without}')
        return N_iters, outputs, min(2 * elapsed, left / 2)

    def affordable(self, seconds):
        """Divide outputs, a dict name -> seconds, into those to make and those that would take too long."""
        outputs, too_long = {}, {}
        for name, needed in seconds.items():
            fits = sum(outputs.values()) + needed <= MAX_OUTPUT_SHARE * self.seconds
            (outputs if fits else too_long)[name] = needed
        return outputs, too_long

    def output_seconds(self):
        """How long video and test views take: a dict name -> seconds."""
        if time.perf_counter() - self.measured_at > MEASURE_SHARE * self.seconds:
            self.measure()
        scene, (preparation, per_pixel) = self.scene, self.measured
        H, W, _ = scene.hwf
        cameras = scene.path_cameras
        pixels = {'video': sum(camera.H * camera.W for camera in cameras) if cameras
                  else H * W * len(scene.render_poses),
                  'test views': sum(scene.cameras[view].H * scene.cameras[view].W for view in scene.i_test)}
        per_pixel = per_pixel / self.processes.size + SECONDS_PER_WRITTEN_PIXEL
        return {name: preparation + per_pixel * count for name, count in pixels.items() if count}

    def measure(self):
        """Measure how long the first frame takes in addition to others, and a pixel of the others; at first
        with few pixels, to find out how many suit the machine."""
        view = self.scene.i_train[0]
        pose, camera = self.scene.poses[view], self.scene.cameras[view]
        if self.stride is None:
            self.stride = max(1, math.isqrt(camera.H * camera.W // FIRST_PIXELS))
            self.measure()
        stride = self.stride
        self.frames.drop_cache()  # of the networks of an earlier step
        times = [time.perf_counter()]
        for _ in range(2):
            self.frames.render(pose, stride, camera=camera)
            times.append(time.perf_counter())
        first, second = times[1] - times[0], times[2] - times[1]
        self.measured = max(first - second, 0.0), second * stride ** 2 / (camera.H * camera.W)
        self.measured_at = times[2]
        self.stride = math.ceil(stride * (second / (FRAME_SHARE * self.seconds)) ** 0.5)
