"""The same load on a dense, a fixed and a controlled model; `--model DIR --data DATA` takes a saved model of yours."""

import argparse
import time

import acmize
from acmize.bench import dense_of, real_images
from acmize.models import load_model
from acmize.quickstart_model import digits, digits_dataset
from acmize.serve import BudgetController, Server, load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder of a saved adaptive model; by default the digits model, converted now")
parser.add_argument("--data", help="images for it, anything datasets.load_dataset opens")
parser.add_argument("--seconds", type=float, default=0.6, help="of the peak; some dozens of batches should fit in")
args = parser.parse_args()

if args.model:
    model = acmize.from_pretrained(args.model)
    dense, images = dense_of(model), real_images(model, args.data, limit=128)  # random weights are as fast
else:
    dense, (images, _) = load_model("acmize_vit_digits"), digits("test")
    options = {"limit": 128, "moments": 64, "budgets": (1.0, 0.8), "acm": {"num_learners": 4, "gate_hidden": 8}}
    model = acmize.convert(dense, data=digits_dataset().remove_columns("label"), budget=0.6, phases=(), **options)


def capacity(net, rounds=4):
    """Images a second as long as full batches of 8 wait, in the best round: other work of the machine only slows it."""
    seconds = []
    with Server(net, max_batch=8) as server:
        for _ in range(rounds):
            start = time.perf_counter()
            for image in images[:128]:
                server.submit(image)
            server.flush()
            seconds.append(time.perf_counter() - start)
    return 128 / min(seconds)


most = capacity(dense)
target = 48 / most  # the time of six full batches
controller = BudgetController.of(model, target)
print(f"images a second at most: dense {most:.0f}", end="")
for budget in (controller.config.low, controller.config.high):  # fixed stays at the latter
    model.set_budget(budget)
    print(f", adaptive at {budget:.2f} {capacity(model):.0f}", end="")
print(f"\ntarget {1e3 * target:.0f} ms; the peak is 1.3 times what the dense model manages")

rates = [(0.3 * most, args.seconds / 2), (1.3 * most, args.seconds), (0.3 * most, args.seconds)]
print("model       phase   p50 ms   p95 ms   p99 ms  images/s  budget  over target")
for name, net, steers in (("dense", dense, None), ("fixed", model, None), ("controlled", model, controller)):
    with Server(net, steers, max_batch=8) as server:
        report = load(server, images, rates, target=target)
    for phase, row in zip(("quiet", "peak", "quiet"), report["phases"], strict=True):
        columns = [f"{row['latency_ms'][p]:8.1f}" for p in ("p50", "p95", "p99")]
        columns += [f"{row['throughput']:9.0f}", f"{row['budget'] or 1:7.2f}", f"{row['over_target']:12.0%}"]
        print(f"{name:<11} {phase:<5}", *columns)
if not args.model:
    print("The digits model is so small that its adaptive form is not faster than the dense one: no budget keeps up")
    print("with this peak. A gain shows with a larger model: --model DIR --data DATA")
