// The server: JSON calls, streamed answers, and what goes wrong in words. Nothing here touches the page.

const KEY = 'lora_tune.token';

// The access token of this tab. It is never written anywhere else.
export const token = {
  get: () => sessionStorage.getItem(KEY) ?? '',
  set: value => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

// Why there is no answer. `kind`: unauthorized, busy, gone, broken, refused.
export class Failure extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

// GET without `body`, else POST; returns what the server's JSON says. Throws Failure.
export async function ask(path, body, signal) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure('broken', 'The server’s answer broke off.');
  }
}

// The chunks of a streamed chat completion, parsed. Throws Failure, also where the stream ends before its end.
export async function* stream(body, signal) {
  const response = await send('v1/chat/completions', { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = '', data = [];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines.map(line => line.replace(/\r$/, ''))) {
        if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
        if (line !== '' || !data.length) continue;
        const event = data.join('\n');
        data = [];
        if (event === '[DONE]') return;
        const chunk = JSON.parse(event);
        if (chunk.error) throw new Failure('refused', chunk.error.message ?? 'The server failed on this answer.');
        yield chunk;
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
  } finally {
    reader.cancel().catch(() => {}); // a reader who leaves cancels the request
  }
  throw new Failure('broken', 'The connection broke off before the answer was whole.');
}

async function send(path, body, signal) {
  const headers = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
  const request = { headers, signal, cache: 'no-store', credentials: 'omit', redirect: 'error' };
  if (body !== undefined) {
    headers['Content-Type'] = 'application/json';
    Object.assign(request, { method: 'POST', body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure('gone', 'The server cannot be reached. Is it still running?');
  }
  if (response.ok) return response;
  const said = await reason(response);
  if (response.status === 401) throw new Failure('unauthorized', 'The server wants its access token.');
  if (response.status === 429) {
    const wait = response.headers.get('Retry-After');
    throw new Failure('busy', `The server is busy: ${said || 'its queue is full'}${wait ? ` (try again in ${wait} s)` : ''}.`);
  }
  throw new Failure('refused', said || `The server refused (${response.status}).`);
}

// What the body of a refusal says, in OpenAI's form or FastAPI's.
async function reason(response) {
  try {
    const said = await response.json();
    const text = said.error?.message ?? said.detail ?? '';
    return (typeof text === 'string' ? text : JSON.stringify(text)).replace(/\.$/, '');
  } catch {
    return '';
  }
}
