"""The page from Python: a short training, then base and tuned side by side.

python -m app                       # in one terminal
python app/example_client.py       # in another
"""

import argparse
import shutil
import time

import yaml
from gradio_client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--password", help="Where the page has one.")
    parser.add_argument("--name", default="example", help="Of the run.")
    parser.add_argument("--max_train_steps", type=int, default=10)
    options = parser.parse_args()
    auth = ("alignkit", options.password) if options.password else None
    page = Client(options.url, auth=auth, verbose=False, httpx_kwargs={"timeout": 60})

    config = yaml.safe_load(page.predict("alignprop", api_name="/presets")["emoji"])
    config |= {"max_train_steps": options.max_train_steps, "validation_steps": 5, "num_validation_images": 4}
    config = yaml.safe_dump(config)
    print(page.predict("alignprop", config, api_name="/dry_run"))
    run = page.predict("alignprop", options.name, config, api_name="/start_training")
    status = page.predict(run, api_name="/run_status")
    while status["state"] == "running":
        time.sleep(5)
        status = page.predict(run, api_name="/run_status")
        print(f"{status['state']}, step {status['step']} of {status['max_steps']}")
    if status["state"] != "finished":
        raise SystemExit(status["message"])

    _, base, tuned, settings = page.predict(
        "a cat on a blue background", loras=[run], seed=3, api_name="/generate"
    )  # fmt: skip
    for file, name in ((base, "base.png"), (tuned, "tuned.png")):
        shutil.copy(file, name)
    print(f"base.png, tuned.png: {settings}")


if __name__ == "__main__":
    main()
