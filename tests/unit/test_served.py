"""What a labeler got is what a thumb is about: token by token, whichever replica wrote it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from dpo_ray.buffer import PreferenceBuffer, ServedCompletion
from dpo_ray.storage import Storage
from serve import served as served_module
from serve.served import RecordedAnswers, ServedLog
from serve.tokens import Caller, Role
from serve.versions import VersionedAnswers
from tests.unit.fake_serving import FakeLLM, LocalBox, completions_app
