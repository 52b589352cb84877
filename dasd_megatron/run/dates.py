"""The day that chat templates show as today's: one for a run, whatever the clocks of its machines say."""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING

from dasd_megatron.config import Config
from dasd_megatron.data.templates import chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_date(config: Config, date: str | None) -> Config:
    """Return the configuration with ``data.date``."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def choose_date(config: Config, tokenizer: PreTrainedTokenizerBase) -> Config:
    """Return the configuration with the day of a run whose chat template shows it: ``data.date``, or else today here.

    Other templates need none, and their runs do not differ from day to day.
    """
    template = chat_template(tokenizer, {}, None)
    if template is None or not template.shows_date:
        return config
    chosen = with_date(config, config.data.date or datetime.date.today().isoformat())
    print(f"data.date={chosen.data.date}: the tokenizer's chat template shows it as today's date", flush=True)
    return chosen
