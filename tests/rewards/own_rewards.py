"""Functions that tests name by `reward.path`: some do what a user's function must not do."""

import os
import time


def equal(prompts, responses, rows):
    """1 where the response is the row's answer."""
    return [float(response == row["answer"]) for response, row in zip(responses, rows, strict=True)]


def misbehaving(prompts, responses, rows):
    """Does what the response says, if that is one of the bad things; otherwise as `equal`."""
    for response in responses:
        if response == "hang":
            time.sleep(1000)
        if response == "spin":
            while True:
                pass
        if response == "abort":
            os.abort()
        if response == "exit":
            os._exit(0)
        if response == "allocate":
            held = []
            while True:
                held.append(bytearray(10**7))
        if response == "raise":
            raise KeyError("boo")
    return equal(prompts, responses, rows)


def slow(prompts, responses, rows):
    """As `equal`, after 20 ms for each."""
    time.sleep(0.02 * len(responses))
    return equal(prompts, responses, rows)


def shares(prompts, responses, rows):
    """Half of everything."""
    return [0.5] * len(responses)


def computes(prompts, responses, rows):
    """As `equal`, after 0.3 s of processor time."""
    begin = time.process_time()
    while time.process_time() < begin + 0.3:
        pass
    return equal(prompts, responses, rows)


def returns(prompts, responses, rows):
    """What the first row says."""
    return rows[0]["returns"]


def with_reasons(prompts, responses, rows):
    """Results with everything that a result may have."""
    return [
        {
            "reward": len(response),
            "reason": f"{len(prompt)} characters",
            "canonical": ("a", 1),
            "correct": True,
            "parts": {"x": 2},
        }
        for prompt, response in zip(prompts, responses, strict=True)
    ]
