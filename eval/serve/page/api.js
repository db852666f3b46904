// The JSON API; whatever goes wrong becomes an Error with one sentence.

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  const found = await response.json().catch(() => null);
  if (!response.ok) throw new Error(found?.error ?? `The server answered ${response.status}.`);
  return found;
}

const of = (index) => `/api/indices/${encodeURIComponent(index)}`;
const sample = (index, id) => `${of(index)}/samples/${id}`;

export const indices = () => answer(fetch("/api/indices"));
const asked = (words) => new URLSearchParams(Object.entries(words).filter(([, word]) => word !== null));
export const some = (index, count, seed, where, signal) => answer(fetch(`${of(index)}/samples?${asked({ count, seed, where })}`, { signal }));
export const one = (index, id) => answer(fetch(sample(index, id)));
export const columns = (index) => answer(fetch(`${of(index)}/columns`));
export const duplicates = (index, threshold, where, signal) =>
  answer(fetch(`${of(index)}/duplicates?${asked({ threshold, where })}`, { signal }));
export const plot = (index, id, modality) => answer(fetch(`${sample(index, id)}/plot/${encodeURIComponent(modality)}`));
export const media = (index, id, modality, side) =>
  `${sample(index, id)}/media/${encodeURIComponent(modality)}` + (side ? `?side=${side}` : "");
export const search = (query, signal) =>
  answer(fetch("/api/search", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(query), signal }));
