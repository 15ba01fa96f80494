// Reads the API from a component. The last response stays on the screen while it is read again.
import { useCallback, useEffect, useRef, useState } from "./html.js";
import { read } from "./api.js";

/** {data, error, loading, reload, replace} of a GET request; null for `path` requests nothing. */
export function useResource(path) {
  const [state, setState] = useState({ data: null, error: null, loading: Boolean(path), path });
  const current = useRef(path);
  current.current = path;
  const reads = useRef({ begun: 0, taken: 0 });

  const reload = useCallback(async () => {
    if (!path) return;
    const number = ++reads.current.begun;
    const isOverdue = () => current.current !== path || number < reads.current.taken; // a later request was faster
    try {
      const data = await read(path);
      if (isOverdue()) return;
      reads.current.taken = number;
      setState({ data, error: null, loading: false, path });
    } catch (error) {
      if (!isOverdue()) setState((was) => ({ ...was, error, loading: false, path }));
    }
  }, [path]);

  useEffect(() => {
    setState((was) => (was.path === path ? was : { data: null, error: null, loading: Boolean(path), path }));
    reload();
  }, [path]);

  const replace = useCallback((data) => setState((was) => ({ ...was, data, error: null })), []);
  return { ...state, reload, replace };
}
