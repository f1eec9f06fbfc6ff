// Requests. What goes wrong becomes a Problem: the server's own sentence and fixes (application/problem+json).

export class Problem extends Error {
  constructor(detail, fixes = []) {
    super(detail);
    this.fixes = fixes;
  }
}

/** JSON of `path`; with `body` it is a POST. An aborted request throws the signal's AbortError. */
export async function ask(path, { body, signal } = {}) {
  const options = { signal };
  if (body !== undefined) {
    Object.assign(options, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer.", ["see whether it still runs, then try again"]);
  }
  if (response.ok) return response.json();
  throw await problemOf(response);
}

async function problemOf(response) {
  try {
    const { detail, errors = [] } = await response.json();
    return new Problem(detail, [...new Set(errors.map((error) => error.fix).filter(Boolean))]);
  } catch {
    return new Problem(`The server answered ${response.status}.`, ["try again"]);
  }
}

export const searchItems = (text, signal) => ask(`v1/search?limit=12&q=${encodeURIComponent(text)}`, { signal });
export const findItem = (id) => ask(`v1/items/${encodeURIComponent(id)}`);
export const listUsers = (prefix, signal) => ask(`v1/users?limit=12&prefix=${encodeURIComponent(prefix)}`, { signal });
export const userHistory = (id) => ask(`v1/users/${encodeURIComponent(id)}/history`);
