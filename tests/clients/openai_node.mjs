// What openai-node makes of the server: node openai_node.mjs BASE_URL; prints JSON.
// Run by tests/test_clients.py in a folder where `npm install openai` has been.
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.cwd(), "here.js"));
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "世界上最高的山是什么？" }];
const common = { model: "any", messages, max_tokens: 24, temperature: 0 };
const said = {};

said.models = (await client.models.list()).data.map((model) => model.id);
said.model = (await client.models.retrieve(said.models[0])).id;

const whole = await client.chat.completions.create(common);
said.whole = whole.choices[0].message.content;
said.reason = whole.choices[0].finish_reason;
said.usage = whole.usage;

// as FastGPT reads a stream, under its own Accept header
const stream = await client.chat.completions.create(
  { ...common, stream: true, stream_options: { include_usage: true } },
  { headers: { Accept: "application/json, text/plain, */*" } },
);
said.streamed = "";
for await (const chunk of stream) {
  const delta = chunk.choices?.[0]?.delta;
  said.streamed += delta?.content || "";
  said.streamReason = chunk.choices?.[0]?.finish_reason || said.streamReason;
  said.streamUsage = chunk.usage || said.streamUsage;
}

// the library's own reader, which checks the order of what comes
const runner = client.chat.completions.stream({ ...common, n: 2, seed: 7, temperature: 1 });
const final = await runner.finalChatCompletion();
said.choices = final.choices.map((choice) => choice.message.content);

const legacy = await client.completions.create({ model: "any", prompt: "山", max_tokens: 4 });
said.legacy = legacy.choices[0].finish_reason;

// a reader that has enough
const cut = await client.chat.completions.create({ ...common, max_tokens: 200, stream: true });
said.nBeforeAbort = 0;
for await (const _ of cut) {
  said.nBeforeAbort += 1;
  if (said.nBeforeAbort === 5) cut.controller.abort();
}

async function failure(body) {
  try {
    await client.chat.completions.create({ ...common, ...body });
    return null;
  } catch (error) {
    const { status, code, param, type } = error;
    return { kind: error.constructor.name, status, code, param, type, message: error.message };
  }
}
said.tooLong = await failure({ messages: [{ role: "user", content: "山".repeat(2000) }], stream: true });
said.tooHot = await failure({ temperature: 3 });
console.log(JSON.stringify(said));
