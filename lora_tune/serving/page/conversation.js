// The conversation: turns, each with one answer for every column. Nothing here touches the page.

import { Failure, stream } from './api.js';

const LEAST = 8, LEAST_MS = 50; // tokens and time of which a rate is told

// One answer of one model. `messages` are what was sent; `state`: waiting, running, done, stopped, failed.
export class Answer {
  constructor(model, messages, sampling) {
    Object.assign(this, { model, messages, sampling, text: '', state: 'waiting', finish: null, usage: null, failure: null });
  }

  // The request as the server gets it (and `curl` shows it).
  get body() {
    return { model: this.model, messages: this.messages, ...this.sampling };
  }

  // Streams the answer; `onText` gets every piece. Ends in a state, never with an exception of the server's.
  async run(signal, onText) {
    Object.assign(this, { text: '', state: 'waiting', finish: null, usage: null, failure: null });
    const start = performance.now();
    this.firstMs = this.tokensPerSecond = null;
    let first = null;
    try {
      for await (const chunk of stream(this.body, signal)) {
        const choice = chunk.choices?.[0], piece = choice?.delta?.content;
        if (piece) {
          first ??= performance.now();
          this.firstMs ??= first - start;
          this.state = 'running';
          this.text += piece;
          onText(piece);
        }
        if (choice?.finish_reason) this.finish = choice.finish_reason;
        if (chunk.usage) this.usage = chunk.usage;
      }
      this.state = 'done';
    } catch (error) {
      this.state = signal.aborted ? 'stopped' : 'failed';
      if (!signal.aborted) this.failure = error instanceof Failure ? error : new Failure('broken', 'The answer could not be read.');
    }
    // of a few tokens that arrive together nothing can be told
    const made = this.usage?.completion_tokens, took = performance.now() - first;
    if (first !== null && made >= LEAST && took >= LEAST_MS) this.tokensPerSecond = (made - 1) / (took / 1000);
  }

  // Whether a next prompt can build on it.
  get usable() {
    return (this.state === 'done' || this.state === 'stopped') && this.text !== '';
  }
}

export class Conversation {
  turns = []; // {prompt, answers, adopted: number of the answer that all columns go on from, or null}

  // The messages that a column sends for a prompt. Turns in which it has no answer are left out.
  messages(column, prompt, system) {
    const found = system ? [{ role: 'system', content: system }] : [];
    for (const turn of this.turns) {
      const answer = turn.answers[turn.adopted ?? column] ?? turn.answers[0];
      if (!answer.usable) continue;
      found.push({ role: 'user', content: turn.prompt }, { role: 'assistant', content: answer.text });
    }
    return [...found, { role: 'user', content: prompt }];
  }

  // A new turn with a waiting answer for each model.
  add(prompt, models, { system, sampling }) {
    const answers = models.map((model, column) => new Answer(model, this.messages(column, prompt, system), sampling));
    const turn = { prompt, answers, adopted: null };
    this.turns.push(turn);
    return turn;
  }
}

// Why a turn cannot be voted on, or ''.
export function cannotVote({ answers }) {
  if (answers.some(answer => answer.state !== 'done')) return 'Votes need whole answers.';
  const asked = answers.map(answer => JSON.stringify(answer.messages));
  if (asked.some(messages => messages !== asked[0])) {
    return 'These columns have different conversations behind them, and a preference needs one prompt. Choose “Continue all from here” at an answer to vote on later turns.';
  }
  return '';
}

// The request as a command for a POSIX shell. The token stays out of it.
export function curl(answer, { wantsToken }) {
  const quoted = text => `'${text.replaceAll("'", `'\\''`)}'`;
  const lines = [`curl -N ${quoted(new URL('v1/chat/completions', document.baseURI).href)}`, `-H 'Content-Type: application/json'`];
  if (wantsToken) lines.push('-H "Authorization: Bearer $LORA_TUNE_TOKEN"');
  lines.push(`-d ${quoted(JSON.stringify({ ...answer.body, stream: true }, null, 1))}`);
  return lines.join(' \\\n  ');
}
