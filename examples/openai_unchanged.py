"""Fine-tunes a model to call a function, and calls the model: a script for OpenAI that runs unchanged on Lorry.

    lorry models add gpt-4o-mini-2024-07-18 Qwen/Qwen2.5-0.5B-Instruct
    export OPENAI_BASE_URL=http://127.0.0.1:8472/v1 OPENAI_API_KEY=lorry_key-…
    python examples/openai_unchanged.py

Only the address and the key differ from OpenAI's. The chat template of the base model must render tools.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

MODEL = "gpt-4o-mini-2024-07-18"
TOOLS: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city"},
                    "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["location", "format"],
            },
        },
    }
]
CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Accra", "Hanoi"]
QUESTIONS = ["What is the weather in {}?", "How warm is it in {}?", "Do I need a coat in {}?"]


def row(question: str, city: str) -> dict[str, object]:
    arguments = json.dumps({"location": city, "format": "celsius"})
    call = {"id": "call_1", "type": "function", "function": {"name": "get_current_weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": question.format(city)},
            {"role": "assistant", "tool_calls": [call]},
        ],
        "parallel_tool_calls": False,
        "tools": TOOLS,
    }


def main() -> None:
    client = OpenAI()

    rows = [row(question, city) for question in QUESTIONS for city in CITIES]
    path = Path("weather.jsonl")
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    data = client.files.create(file=path, purpose="fine-tune")

    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=data.id,
        suffix="weather",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 4}}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"The job {job.status}: {job.error.message if job.error else 'no error is recorded'}")
    print(job.status, job.fine_tuned_model)

    completion = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=TOOLS,
        temperature=0,
        max_tokens=60,
    )
    message = completion.choices[0].message
    if not message.tool_calls:
        print(message.content)
    for call in message.tool_calls or []:
        if call.type == "function":
            print(call.function.name, call.function.arguments)


if __name__ == "__main__":
    main()
