"""Serving under load: a server, a controller that makes its model's budget follow the queue, a load to try it with."""

from acmize.serve.controller import BudgetController, ControllerConfig
from acmize.serve.server import Answer, Server
from acmize.serve.traffic import arrivals, load

__all__ = ["Answer", "BudgetController", "ControllerConfig", "Server", "arrivals", "load"]
