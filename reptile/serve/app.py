"""The routes: the Open Inference Protocol, the tasks, health, metrics, and the document of them.

Turns requests into calls of `service` and its errors into answers; decides nothing else.
"""

import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from reptile import __version__
from reptile.errors import InputError
from reptile.images import decode, fit
from reptile.runtime import FewShotModel
from reptile.serve.guard import Guard
from reptile.serve.protocol import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    metadata,
    read_inputs,
    write_outputs,
)
from reptile.serve.service import GRAPHS, TASK, NotFiniteError, Service, UnknownError
from reptile.serve.settings import ServeSettings
from reptile.serve.store import TaughtTask
from reptile.serve.workers import BusyError

Array = npt.NDArray[Any]
Label = str | int | float | bool
