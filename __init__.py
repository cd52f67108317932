"""Residency decides where ComfyUI's model weights live. The composition root: it never raises, so as not to cost a ComfyUI."""
import logging
import os
from pathlib import Path

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # no nodes; without the name ComfyUI reports a failed import
__version__ = "0.1.0"


class Plugin:
    """The running plugin. Its hooks tell it of prompts; between them it follows the settings."""

    def __init__(self) -> None:
        from . import hooks, policies, settings, telemetry
        from .policies.chain import PolicyChain
        from .telemetry import sinks
        self._policies, self._telemetry, self._sinks, self._loader_nodes = policies, telemetry, sinks, hooks.loader_nodes
        self.host = hooks.host.connect()
        self.folder = hooks.host.user_folder()
        files = Path(__file__).parent / "settings.toml", self.folder / "settings.toml"
        self.settings = settings.Watch(files, policies.tables())
        self.tools = policies.Tools.make(self.host)
        self.chain = PolicyChain(is_cancel=self.host.lifecycle.is_cancel, is_oom=self.host.memory.is_oom)
        self.registry = hooks.HookRegistry(hooks.all_hooks(self.tools.bank, self), self.chain.answer, self.chain.is_oom)
        if not self.settings.now.enabled:
            return
        try:
            self.apply()
            hooks.exercise(self.registry)
            self.registry.tell()
            hooks.host.tell_started(__version__, self.chain.names(), self.settings.now.origin, self.folder)
        except BaseException:
            self.stop()
            raise

    def apply(self) -> None:
        """Puts the settings in force; a policy whose settings are the same goes on."""
        now = self.settings.now
        self._telemetry.replace(self._sinks.open_all(now.telemetry, self.folder) if now.enabled else [])
        self.chain.switch(self._policies.load(now, self.tools, self.chain.policies))
        self.registry.sync(self.chain.wanted() if now.enabled else None)

    def stop(self) -> None:
        """Takes everything out again."""
        self.registry.remove_all()
        self.chain.switch(())

    def prompt_starts(self) -> None:
        self.registry.add(self._loader_nodes.found(), self.chain.wanted())
        self.registry.check_reach()
        if self.settings.changed():
            self.apply()
            self._telemetry.emit("settings.changed", policies=self.chain.names())


if not os.environ.get("RESIDENCY_DISABLE"):
    try:
        plugin = Plugin()
    except Exception as error:  # whatever it is, ComfyUI must start
        logging.getLogger("residency").error("[residency] not started, ComfyUI runs as usual. %s", error)
