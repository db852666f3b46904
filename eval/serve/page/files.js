// Files and the microphone -> pieces of a query: {kind, name, data (base64), preview}.

const MOST_BYTES = 16 << 20;
const RECORDED_SECONDS = 30;
const AS_THEY_ARE = { image: ["image/jpeg", "image/png", "image/webp"], audio: ["audio/wav", "audio/x-wav", "audio/flac", "audio/x-flac", "audio/ogg", "audio/mpeg"] };
const ENDINGS = { image: /\.(jpe?g|png|webp|gif|avif|bmp|svg|heic)$/i, audio: /\.(wav|flac|ogg|oga|mp3|m4a|aac|opus|webm)$/i, timeseries: /\.(npy|csv)$/i };

export function kindOf(file) {
  if (ENDINGS.timeseries.test(file.name)) return "timeseries";
  for (const kind of ["image", "audio"]) if (file.type.startsWith(`${kind}/`) || ENDINGS[kind].test(file.name)) return kind;
  return null;
}

// What the server does not read, or would be too much for it, is drawn or played once here and sent as PNG or WAV.
export async function partOf(file) {
  const kind = kindOf(file);
  if (kind === null) throw new Error(`${file.name} is no picture, sound or signal (.npy, .csv).`);
  if (kind === "timeseries") return signalOf(file);
  const fits = file.size <= MOST_BYTES && AS_THEY_ARE[kind].includes(file.type);
  const sent = fits ? file : await (kind === "image" ? redrawn(file) : replayed(file));
  return { kind, name: file.name || kind, data: await base64(sent), preview: URL.createObjectURL(sent) };
}

async function redrawn(file) {
  const picture = new Image();
  const address = URL.createObjectURL(file);
  picture.src = address;
  try {
    await picture.decode();
  } catch {
    throw new Error(`${file.name} is no picture that this browser can read.`);
  } finally {
    URL.revokeObjectURL(address);
  }
  const scale = Math.min(1, 2048 / Math.max(picture.naturalWidth, picture.naturalHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error(`${file.name} cannot be drawn.`))), "image/png"));
}

async function replayed(file) {
  const context = new OfflineAudioContext(1, 1, 48000);
  let sound;
  try {
    sound = await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name || "The recording"} is no sound that this browser can read.`);
  }
  const length = Math.min(sound.length, Math.floor((MOST_BYTES - 64) / 2));
  const mono = new Float32Array(length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let i = 0; i < length; i++) mono[i] += samples[i] / sound.numberOfChannels;
  }
  return wav(mono, sound.sampleRate);
}

function wav(samples, rate) {
  const bytes = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((letter, i) => bytes.setUint8(at + i, letter.charCodeAt(0)));
  word(0, "RIFF"); bytes.setUint32(4, 36 + 2 * samples.length, true); word(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true); bytes.setUint16(20, 1, true); bytes.setUint16(22, 1, true);
  bytes.setUint32(24, rate, true); bytes.setUint32(28, 2 * rate, true); bytes.setUint16(32, 2, true); bytes.setUint16(34, 16, true);
  word(36, "data"); bytes.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => bytes.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, value))), true));
  return new Blob([bytes], { type: "audio/wav" });
}

async function signalOf(file) {
  if (file.size > MOST_BYTES) throw new Error(`${file.name} is above ${MOST_BYTES >> 20} MiB.`);
  if (/\.npy$/i.test(file.name)) return { kind: "timeseries", name: file.name, data: await base64(file), rate: "", channels: "" };
  const { names, values, rate } = csv(await file.text(), file.name);
  return { kind: "timeseries", name: file.name, data: await base64(npy(values, names.length)), rate: rate ?? "", channels: names.join(", ") };
}

// Columns with their names in the first line; a column called time, in seconds, gives the rate.
function csv(text, name) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim()).map((line) => line.split(/[,;\t]/).map((cell) => cell.trim().replace(/^"|"$/g, "")));
  const [head, ...rows] = lines;
  if (!rows.length || !head.some((cell) => Number.isNaN(Number(cell)))) throw new Error(`${name} needs the names of its channels in the first line, and numbers below.`);
  const time = head.findIndex((cell) => /^(time|t|seconds)$/i.test(cell));
  const kept = head.map((_, i) => i).filter((i) => i !== time);
  const values = rows.flatMap((row) => kept.map((i) => Number(row[i])));
  if (!kept.length || values.some((value) => !Number.isFinite(value))) throw new Error(`${name} has cells that are no numbers.`);
  const span = time < 0 ? 0 : Number(rows.at(-1)[time]) - Number(rows[0][time]);
  return { names: kept.map((i) => head[i]), values, rate: span > 0 ? Number(((rows.length - 1) / span).toPrecision(6)) : null };
}

function npy(values, columns) {
  const about = `{'descr': '<f4', 'fortran_order': False, 'shape': (${values.length / columns}, ${columns}), }`;
  const head = about.padEnd(Math.ceil((about.length + 11) / 64) * 64 - 11) + "\n";
  const magic = new Uint8Array([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, head.length & 255, head.length >> 8]);
  return new Blob([magic, head, new Float32Array(values)]);
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

export const canRecord = () => window.isSecureContext && "MediaRecorder" in window && Boolean(navigator.mediaDevices?.getUserMedia);

// Starts at once; `stop` ends it, as do some seconds; `part` comes when it ended.
export async function record(tick) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    throw new Error("The microphone was not allowed, or there is none.");
  }
  const recorder = new MediaRecorder(stream), pieces = [], begun = performance.now();
  const timer = setInterval(() => {
    const passed = (performance.now() - begun) / 1000;
    tick(passed);
    if (passed >= RECORDED_SECONDS) stop();
  }, 100);
  const stop = () => recorder.state !== "inactive" && recorder.stop();
  const part = new Promise((done, failed) => {
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = async () => {
      clearInterval(timer);
      stream.getTracks().forEach((track) => track.stop());
      try {
        const sound = await replayed(new Blob(pieces, { type: recorder.mimeType }));
        done({ kind: "audio", name: "recording", data: await base64(sound), preview: URL.createObjectURL(sound) });
      } catch (error) {
        failed(error);
      }
    };
  });
  recorder.start();
  return { stop, part };
}
