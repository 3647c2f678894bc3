"""Run the command line in this process, and small models for it."""

import json

import tiny
import words
from typer.testing import CliRunner

from sparc3.cli import app

POSITIONS = 48


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def succeed_json(*arguments):
    return json.loads(succeed(*arguments, "--json"))


def saved(model, folder):
    model.save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    return folder


def llama(seed=0, **changes):
    changes = {"vocab_size": words.VOCABULARY, "max_position_embeddings": POSITIONS} | changes
    return tiny.build("llama", seed=seed, **changes)
