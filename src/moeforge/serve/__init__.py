"""A server for one model that speaks the OpenAI API."""

from moeforge.serve.app import build as build
from moeforge.serve.run import Limits as Limits
from moeforge.serve.run import serve as serve
