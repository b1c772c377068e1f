"""langchain-tests' ChatModelIntegrationTests: LangChain's own client for OpenAI against this server.

Run by pytest in LangChain's environment; CONFORMANCE_URL is the server. What is declared here is what the server has,
whatever a small model makes of it. Images, audio and PDFs are not declared: the server takes text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class OneCall(ChatOpenAI):
    """Asks for one call at a time, as clients may: the suite counts calls, and a small model goes on with more."""

    def bind_tools(self, tools: Sequence[Any], **given: Any) -> Any:
        return super().bind_tools(tools, **{"parallel_tool_calls": False, **given})


class TestServer(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return OneCall

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "model", "base_url": os.environ["CONFORMANCE_URL"] + "/v1", "api_key": "none", "temperature": 0,
            "seed": 1, "frequency_penalty": 1.0, "max_tokens": 160, "max_retries": 0, "timeout": 600,
            "stream_usage": True,
        }  # fmt: skip

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def returns_usage_metadata(self) -> bool:
        return True
