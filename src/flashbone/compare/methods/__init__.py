"""The methods that `flashbone compare` knows: how each is configured, attached to a model and saved."""

from flashbone.compare.methods.attaching import attach as attach
from flashbone.compare.methods.registry import METHODS as METHODS
from flashbone.compare.methods.registry import Method as Method
from flashbone.compare.methods.registry import get as get
from flashbone.compare.methods.saving import adapter_bytes as adapter_bytes
from flashbone.compare.methods.saving import save as save
